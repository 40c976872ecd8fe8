//! Checkpoints: where they are found, what they hold, and their bytes. No tensor operation.
