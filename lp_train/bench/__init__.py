"""What a step costs, by arithmetic: shapes, FLOPs, memory."""
