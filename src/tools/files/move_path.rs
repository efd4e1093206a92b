//! `move_path`: another name or place for a file or a directory of one environment.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::staging::Leftover;
use super::{Attempts, Failure, FileError, answer, look, native};
use crate::protocol::path::FileUri;
use crate::protocol::rest::ToolResult;
use crate::protocol::rpc::{FsCopy, FsCreateDirectory, FsRemove};
use crate::relay::client::Client;
use crate::tools::{Effect, Run, Site, Tool, ToolError, before, parse, resolve};

pub(in crate::tools) const TOOL: Tool = Tool {
    name: "move_path",
    description: "Rename or move a file, a link or a directory within one environment; `destination` is its new path, \
                  not a directory to put it into. What is there is kept, and the failure is `exists`, unless \
                  `overwrite` is true; a directory is never overwritten. On one file system the move is one step that \
                  happens or does not (`atomic`); to another one the content is copied, then the source removed.",
    effect: Effect::Destroys,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

const MOVE: &str = include_str!("move.sh");

/// Arguments of `move_path`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// What to move; relative paths and `~` are taken on the executor.
    source: String,
    /// Where it is to be.
    destination: String,
    /// Whether a file that is there is replaced.
    #[serde(default)]
    overwrite: bool,
    /// Whether missing directories of the destination are made.
    #[serde(default)]
    create_parents: bool,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// As it was asked for; nothing is there now.
    source: String,
    /// As it was asked for.
    destination: String,
    /// Whether it was one step.
    atomic: bool,
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let deadline = site.call.deadline(None)?;
    let moving = async {
        let attempts = Attempts::visible(site, deadline).await?;
        let client = attempts.client();
        let of = |field, path| resolve(client.environment(), field, path).map(|path| path.resolved());
        let (source, target) = (of("source", &arguments.source)?, of("destination", &arguments.destination)?);
        let (Some(_), Some(directory)) = (source.parent(), target.parent()) else {
            return Err(Failure::new("invalid", "the root is not moved").into());
        };
        let beside = Leftover::beside(site, client, &directory);
        let option = |given, name| if given { name } else { "" };
        let overwrite = option(arguments.overwrite, "overwrite");
        let parents = option(arguments.create_parents, "parents");
        let paths = (native(&source)?, native(&target)?, native(beside.path())?);
        let words = [paths.0.as_str(), paths.1.as_str(), overwrite, parents, paths.2.as_str()];
        let atomic = match site.script(MOVE, &words, deadline).await? {
            Some(ended) if ended.exit_code == Some(0) => ended.stdout.starts_with(b"moved"),
            Some(ended) => return Err(Failure::said(&ended).into()),
            None => {
                without_shell(client, &arguments, source, target).await?;
                false
            }
        };
        beside.gone();
        let Arguments { source, destination, .. } = &arguments;
        Ok(answer(Output { source: source.clone(), destination: destination.clone(), atomic }, "moved"))
    };
    before(deadline, async { moving.await.or_else(|error: FileError| error.result(&TOOL)) }).await
}

async fn without_shell(
    client: &Client,
    arguments: &Arguments,
    source: FileUri,
    target: FileUri,
) -> Result<(), FileError> {
    match look(client, &target).await? {
        Some(_) if !arguments.overwrite => return Err(Failure::new("exists", "the path exists").into()),
        Some(found) if found.is_directory => {
            return Err(Failure::new("is_a_directory", "the path is a directory").into());
        }
        Some(_) | None => {}
    }
    if let (true, Some(path)) = (arguments.create_parents, target.parent()) {
        client.call(&FsCreateDirectory { path, recursive: true }).await?;
    }
    client.call(&FsCopy { source_path: source.clone(), destination_path: target, recursive: true }).await?;
    client.call(&FsRemove { path: source, recursive: true, force: false }).await?;
    Ok(())
}
