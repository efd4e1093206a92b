//! A directory for one test, removed with everything in it when the test ends.

use std::path::{Path, PathBuf};

/// Does not exist yet when handed out: what is under test makes it.
pub(crate) struct ScratchDir(PathBuf);

impl ScratchDir {
    pub(crate) fn new() -> Self {
        // The name is short because the path of a Unix socket holds about a hundred bytes.
        Self(std::env::temp_dir().join(format!("egw-{}", uuid::Uuid::new_v4().simple())))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
