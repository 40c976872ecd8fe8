//! LoRA training.
