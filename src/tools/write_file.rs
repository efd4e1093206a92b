//! `write_file`: the whole content of a file, written in blocks (connectors-api.md §4.3).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::open_file::OpenFile;
use super::{Effect, Run, Site, Tool, ToolError, coded_failure, failure, parse, refused, resolve};
use crate::protocol::path::FileUri;
use crate::protocol::rest::{Ran, ToolResult};
use crate::protocol::rpc::{
    BLOCK_BYTES_MAX, Base64Bytes, FsCreateDirectory, FsGetMetadata, FsWriteFile, NOT_FOUND, OpenMode,
};
use crate::relay::client::{CallError, Client};
use crate::workspace::pool::Use;

pub(super) const TOOL: Tool = Tool {
    name: "write_file",
    description: "Write a file by path.",
    effect: Effect::Destroys,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

/// Arguments of `write_file`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// The file; relative paths and `~` are taken on the executor. An existing file is replaced.
    path: String,
    /// Its whole content in standard base64 with padding; left out is an empty file.
    #[serde(default)]
    content_b64: String,
    /// Whether missing directories of the path are made.
    #[serde(default)]
    create_parents: bool,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// Bytes written.
    bytes: usize,
    /// Whether a reader sees the old file or the new one, and never a part.
    atomic: bool,
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let Arguments { path, content_b64, create_parents } = arguments;
    let deadline = site.call.deadline(None)?;
    let content = STANDARD
        .decode(&content_b64)
        .map_err(|_| ToolError::Arguments("content_b64: expected standard base64 with padding".into()))?;
    drop(content_b64);
    let writing = async {
        let mut client = site.client(Use::Files, deadline).await?;
        let mut way = site.way_back(Use::Files, deadline);
        loop {
            let ran = match attempt(&client, &path, &content, create_parents).await {
                Err(ToolError::Lost { ran }) => ran,
                result => return result,
            };
            let next = way.find(&client, ran == Ran::Unknown).await?;
            // The same bytes at the same places do no harm, unless something else has begun to write there since.
            if way.ran == Ran::Unknown && !next.continues(&client) {
                return Err(ToolError::Lost { ran: way.ran });
            }
            client = next;
        }
    };
    super::before(deadline, writing).await
}

async fn attempt(client: &Client, path: &str, content: &[u8], create_parents: bool) -> Result<ToolResult, ToolError> {
    let uri = resolve(client.environment(), "path", path)?;
    // Opening a pipe or a device could hold up the whole stream at the executor.
    match refused(client.call(&FsGetMetadata { path: uri.clone() }).await)? {
        Ok(metadata) if !metadata.is_file => {
            return Ok(coded_failure("not_a_file", format!("write_file failed: {path} is not a regular file")));
        }
        Err(error) if error.code != NOT_FOUND => return Ok(failure(&TOOL, &error)),
        Ok(_) | Err(_) => {}
    }
    if create_parents && let Some(parent) = uri.parent() {
        let made = client.call(&FsCreateDirectory { path: parent, recursive: true }).await;
        if let Err(error) = refused(made)? {
            return Ok(failure(&TOOL, &error));
        }
    }
    Ok(match refused(write(client, uri, content).await.map_err(|error| begun(error, create_parents)))? {
        Ok(()) => ToolResult {
            // The executor replaces by emptying first, so a cut may leave a part.
            structured_content: Some(
                serde_json::to_value(Output { bytes: content.len(), atomic: false }).expect("plain data"),
            ),
            ..ToolResult::text("ok")
        },
        Err(error) => failure(&TOOL, &error),
    })
}

async fn write(client: &Client, path: FileUri, content: &[u8]) -> Result<(), CallError> {
    if content.len() <= BLOCK_BYTES_MAX {
        let data_base64 = Base64Bytes(content.to_vec());
        client.call(&FsWriteFile { path, data_base64 }).await?;
        return Ok(());
    }
    let file = OpenFile::open(client, &path, OpenMode::Replace).await?;
    let written = async {
        for (at, block) in (0..).step_by(BLOCK_BYTES_MAX).zip(content.chunks(BLOCK_BYTES_MAX)) {
            file.write(at, block).await?;
        }
        file.close().await
    };
    written.await.map_err(|error| begun(error, true))
}

/// Once a part of the call has reached the executor, a request that did not get there no longer means that nothing
/// was done.
fn begun(error: CallError, begun: bool) -> CallError {
    match error {
        CallError::Lost { sent } => CallError::Lost { sent: sent || begun },
        error => error,
    }
}
