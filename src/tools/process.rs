//! A process started for one call, ended with its whole tree when the call is over before the process is.
//!
//! Executors kill the process group of a process that still runs, and nothing once it has exited. What it left behind,
//! and what moved to a session of its own, is found by a mark in the environment of everything it started.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::protocol::path::FileUri;
use crate::protocol::rpc::{EnvInherit, EnvPolicy, ProcessStart, ProcessTerminate};
use crate::relay::client::{CallError, Client, ProcessEvent};

/// The variable that marks a command and all it starts; its value is the process id on the wire, known to nobody else.
/// Outside of `EXEC_GATEWAY_`, where this program refuses what it does not know when it is such a command itself.
pub(super) const MARK: &str = "EXECGW_PROCESS";

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

/// Ends its process on drop, unless it is [`Process::gone`].
pub(super) struct Process {
    client: Client,
    id: String,
    running: bool,
}

impl Process {
    /// A process that is about to be started under this id. Made before the request is sent, so that a call dropped
    /// meanwhile ends what it may have started.
    pub(super) fn new(client: &Client, id: &str) -> Self {
        Self { client: client.clone(), id: id.to_owned(), running: true }
    }

    /// The process ended by itself, or never began.
    pub(super) fn gone(mut self) {
        self.running = false;
    }

    /// Kills the process and all it started; returns when the executor has done so.
    ///
    /// # Errors
    /// [`CallError`] when the executor could not be asked; the attempt goes on in the background.
    pub(super) async fn end(mut self) -> Result<(), CallError> {
        end_tree(&self.client, &self.id).await?;
        self.running = false;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.running && !self.client.is_ended() {
            let (client, id) = (self.client.clone(), std::mem::take(&mut self.id));
            tokio::spawn(async move {
                if let Err(error) = end_tree(&client, &id).await {
                    tracing::debug!(%error, "a process was left to its executor");
                }
            });
        }
    }
}

async fn end_tree(client: &Client, id: &str) -> Result<(), CallError> {
    client.call(&ProcessTerminate { process_id: id.to_owned() }).await?;
    if client.environment().is_windows() {
        return Ok(());
    }
    let sweep = ProcessStart {
        process_id: format!("{id}-end"),
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
