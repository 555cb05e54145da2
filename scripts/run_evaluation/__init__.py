"""What ``scripts/evaluate_run.py`` measures of finished runs, and the pages of one or several of them."""
