//! The right to be the only process that works on a state directory. Whoever opens the store holds it first; it never
//! reads or writes the store.

use std::fs::{File, TryLockError};
use std::path::Path;

use super::{StoreError, make_state_dir, open_private};

/// Held for the life of the process that owns the state directory; dropping it lets go. The kernel lets go of it for
/// a process that was killed, so it is never stale.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateLock {
    /// Takes the lock, and makes the state directory (0700) if there is none. Does not wait.
    ///
    /// # Errors
    /// `Conflict` if another holder lives; `Unavailable` if the directory cannot be used.
    pub fn acquire(state_dir: &Path) -> Result<Self, StoreError> {
        make_state_dir(state_dir)?;
        let file = open_private(&state_dir.join("lock"))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => {
                Err(StoreError::Conflict("another exec-gateway runs on this state directory".into()))
            }
            Err(TryLockError::Error(error)) => Err(StoreError::Unavailable(error.into())),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::scratch::ScratchDir;

    #[test]
    fn a_state_directory_has_one_holder_at_a_time() {
        let dir = ScratchDir::new();
        let held = StateLock::acquire(dir.path()).unwrap();
        let refused = StateLock::acquire(dir.path()).unwrap_err();
        assert_eq!(refused.to_string(), "another exec-gateway runs on this state directory");
        drop(held);
        StateLock::acquire(dir.path()).unwrap();
    }
}
