//! `make_directory`: a new directory.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Attempts, Failure, FileError, answer, look};
use crate::protocol::rest::ToolResult;
use crate::protocol::rpc::FsCreateDirectory;
use crate::tools::{Effect, Run, Site, Tool, ToolError, before, parse, resolve};

pub(in crate::tools) const TOOL: Tool = Tool {
    name: "make_directory",
    description: "Make a directory. With `parents` missing directories above it are made too, and one that is there \
                  already is no failure. Returns whether it was made.",
    effect: Effect::Adds,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

/// Arguments of `make_directory`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// The directory; relative paths and `~` are taken on the executor.
    path: String,
    /// Whether missing directories above it are made, and an existing one is fine.
    #[serde(default)]
    parents: bool,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// False where it was there before.
    created: bool,
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let deadline = site.call.deadline(None)?;
    let making = async {
        let mut attempts = Attempts::visible(site, deadline).await?;
        let created = loop {
            let attempt = attempt(&attempts, &arguments).await;
            if let Some(made) = attempts.over(attempt).await {
                break made?;
            }
        };
        Ok(answer(Output { created }, if created { "made" } else { "was there already" }))
    };
    before(deadline, async { making.await.or_else(|error: FileError| error.result(&TOOL)) }).await
}

async fn attempt(attempts: &Attempts<'_>, arguments: &Arguments) -> Result<bool, FileError> {
    let client = attempts.client();
    let path = resolve(client.environment(), "path", &arguments.path)?;
    match look(client, &path).await? {
        // By the attempt that was cut off, for all that can be told.
        Some(found) if found.is_directory && attempts.again() => return Ok(true),
        Some(found) if found.is_directory && arguments.parents => return Ok(false),
        Some(_) => return Err(Failure::new("exists", "the path exists").into()),
        None => {}
    }
    client.call(&FsCreateDirectory { path, recursive: arguments.parents }).await?;
    Ok(true)
}
