//! The trainer.

mod conversation;
mod dataset;
mod mt19937;
mod sampler;
mod steps;
