//! The embedded store: one SQLite file in the state directory, owned by one thread.

/// Handle to the store; cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {}
