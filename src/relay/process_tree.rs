//! Ends a process with everything it started.
//!
//! Executors kill the process group of a process that still runs, and nothing once it has exited. What it left behind,
//! and what moved to a session of its own, is found by a mark in the environment of everything it started.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::client::{CallError, Client, ProcessEvent};
use crate::protocol::path::FileUri;
use crate::protocol::rpc::{EnvInherit, EnvPolicy, ProcessStart, ProcessTerminate};

/// The variable that marks a command and all it starts; its value is the process id on the wire, known to nobody else.
/// Outside of `EXEC_GATEWAY_`, where this program refuses what it does not know when it is such a command itself.
pub const MARK: &str = "EXECGW_PROCESS";

/// How long the search for left-over processes may take.
const SWEEP_WAIT: Duration = Duration::from_secs(5);

/// Kills every process whose environment carries the mark `$1`, until there is none: one may start another while it
/// is looked for. Needs procfs; elsewhere the process group is all that is ended. The search itself does not carry the
/// mark, since the executor starts it with an environment of its own.
const SWEEP: &str = r#"[ -r /proc/self/environ ] || exit 0
rounds=0
while [ "$rounds" -lt 50 ]; do
  found=
  for file in $(grep -lsF -- "$1" /proc/[0-9]*/environ); do
    pid=${file#/proc/}
    kill -KILL "${pid%/environ}" 2>/dev/null && found=yes
  done
  [ -n "$found" ] || exit 0
  rounds=$((rounds + 1))
done
exit 1"#;

/// Kills the process and all it started; returns when the executor has done so.
///
/// # Errors
/// [`CallError`] when the executor could not be asked.
pub async fn end_tree(client: &Client, id: &str) -> Result<(), CallError> {
    client.call(&ProcessTerminate { process_id: id.to_owned() }).await?;
    if client.environment().is_windows() {
        return Ok(());
    }
    let sweep = ProcessStart {
        // A name of its own each time: after the loss of a link the tree is ended again, in the same session.
        process_id: format!("{id}-end-{}", uuid::Uuid::new_v4().simple()),
        argv: ["/bin/sh", "-c", SWEEP, "sh", &format!("{MARK}={id}")].map(str::to_owned).to_vec(),
        cwd: FileUri::parse("file:///").expect("a literal URI"),
        env: BTreeMap::new(),
        tty: false,
        pipe_stdin: false,
        arg0: None,
        env_policy: Some(EnvPolicy {
            inherit: EnvInherit::Core,
            ignore_default_excludes: false,
            exclude: Vec::new(),
            set: BTreeMap::new(),
            include_only: Vec::new(),
        }),
        sandbox: None,
    };
    let (done, mut finished) = watch::channel(false);
    let _events = client.subscribe(
        &sweep.process_id,
        Box::new(move |event| {
            if let ProcessEvent::Closed(_) = event {
                done.send_replace(true);
            }
        }),
    );
    match client.call(&sweep).await {
        Ok(_) => {
            let _ = timeout(SWEEP_WAIT, finished.wait_for(|done| *done)).await;
            Ok(())
        }
        // An executor without a shell: its process group is all that can be ended.
        Err(CallError::Rpc(_)) => Ok(()),
        Err(error) => Err(error),
    }
}
