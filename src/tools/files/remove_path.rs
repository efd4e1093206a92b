//! `remove_path`: a file, a link or a directory less.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Attempts, Failure, FileError, answer, native};
use crate::protocol::path::FileUri;
use crate::protocol::rest::ToolResult;
use crate::protocol::rpc::{FsRemove, NOT_FOUND};
use crate::relay::client::CallError;
use crate::tools::{Effect, Run, Site, Tool, ToolError, before, parse, resolve};

pub(in crate::tools) const TOOL: Tool = Tool {
    name: "remove_path",
    description: "Remove a file, an empty directory, or with `recursive` a directory with all it holds. Of a symbolic \
                  link the link is removed, not what it points to. Cannot be undone. The root is refused.",
    effect: Effect::Destroys,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

const REMOVE: &str = include_str!("remove.sh");

/// Arguments of `remove_path`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// What to remove; relative paths and `~` are taken on the executor.
    path: String,
    /// Whether a directory goes with all it holds.
    #[serde(default)]
    recursive: bool,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// As it was asked for; nothing is there now.
    removed: String,
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let deadline = site.call.deadline(None)?;
    let removing = async {
        let mut attempts = Attempts::visible(site, deadline).await?;
        let path = resolve(attempts.client().environment(), "path", &arguments.path)?.resolved();
        if path.parent().is_none() {
            return Err(Failure::new("invalid", "the root is not removed").into());
        }
        // In a process of its own: a large tree would hold up the other calls for files.
        let ended = match arguments.recursive {
            true => site.script(REMOVE, &[&native(&path)?], deadline).await?,
            false => None,
        };
        match ended {
            Some(ended) if ended.exit_code == Some(0) => {}
            Some(ended) => return Err(Failure::said(&ended).into()),
            None => loop {
                let attempt = attempt(&attempts, &path, arguments.recursive).await;
                if let Some(removed) = attempts.over(attempt).await {
                    break removed?;
                }
            },
        }
        Ok(answer(Output { removed: arguments.path.clone() }, "removed"))
    };
    before(deadline, async { removing.await.or_else(|error: FileError| error.result(&TOOL)) }).await
}

async fn attempt(attempts: &Attempts<'_>, path: &FileUri, recursive: bool) -> Result<(), FileError> {
    match attempts.client().call(&FsRemove { path: path.clone(), recursive, force: false }).await {
        Ok(_) => Ok(()),
        // By the attempt that was cut off, for all that can be told.
        Err(CallError::Rpc(error)) if error.code == NOT_FOUND && attempts.again() => Ok(()),
        Err(error) => Err(error.into()),
    }
}
