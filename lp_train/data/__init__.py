"""Text for training and evaluation: sources -> tokens -> packed rows."""

from lp_train.data.rows import Data, DataStats, RowCollator, data_of
