//! The verb `merge`: base and adapters into what other programs load.

pub mod gguf;
