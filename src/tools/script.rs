//! A short script in the executor's POSIX shell, for what its file calls cannot do: rename, modes, links, hashes.
//!
//! The scripts are constants. What a caller wrote reaches them as arguments only, so none of it is read as shell.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::execution::{Ended, Execution, execute};
use super::{Site, ToolError};
use crate::protocol::path::FileUri;
use crate::protocol::rest::Ran;
use crate::protocol::rpc::{EnvPolicy, ProcessStart};
use crate::relay::process_tree::MARK;
use crate::workspace::pool::Use;

/// Where POSIX systems have their shell. The shell that the executor names may be one of another language.
const SHELL: &str = "/bin/sh";

/// Bytes of a script's output that are kept.
const OUTPUT_BYTES_MAX: usize = 16 * 1024 * 1024;

impl Site<'_> {
    /// Runs a script with these arguments as `$1`, `$2` …, in the root directory and the C locale; `None`
    /// where the executor has no POSIX shell, and nothing ran. Dropping the future ends the script.
    ///
    /// # Errors
    /// [`ToolError`] where it did not come to an end that is known, or not before the deadline.
    pub(super) async fn script(
        self,
        text: &'static str,
        arguments: &[&str],
        deadline: Instant,
    ) -> Result<Option<Ended>, ToolError> {
        let client = self.client(Use::Processes, deadline).await?;
        let environment = client.environment();
        if environment.is_windows() {
            return Ok(None);
        }
        let process_id = format!("fs_{}", uuid::Uuid::new_v4().simple());
        let mut argv = vec![SHELL.to_owned(), "-c".into(), text.into(), "exec-gateway".into()];
        argv.extend(arguments.iter().map(ToString::to_string));
        let start = ProcessStart {
            // The executor's own may be gone.
            cwd: FileUri::parse("file:///").expect("a literal URI"),
            env: BTreeMap::from([("LC_ALL".into(), "C".into()), (MARK.to_owned(), process_id.clone())]),
            process_id,
            argv,
            tty: false,
            pipe_stdin: false,
            arg0: None,
            env_policy: Some(EnvPolicy::commands(&self.call.settings.env_exclude)),
            sandbox: None,
        };
        match execute(self, client, &start, deadline, OUTPUT_BYTES_MAX).await? {
            Execution::Refused(refusal) => {
                tracing::debug!(message = refusal.message, "an executor has no POSIX shell");
                Ok(None)
            }
            Execution::Ended(ended) if ended.timed_out => Err(ToolError::NoAnswer { ran: Ran::Unknown }),
            Execution::Ended(ended) => Ok(Some(ended)),
        }
    }
}
