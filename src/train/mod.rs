//! The trainer.

mod config;
mod conversation;
mod dataset;
mod deepspeed;
mod mt19937;
mod sampler;
mod steps;
