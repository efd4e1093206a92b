//! What operators look at: metrics and health, on a listener of their own.

pub mod health;
pub mod memory;
pub mod metrics;
