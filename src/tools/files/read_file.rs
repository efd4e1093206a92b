//! `read_file`: a file or a slice of it, read in blocks (connectors-api.md §4.2).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::TryStreamExt;
use futures_util::stream::FuturesOrdered;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::open_file::{BLOCKS_AHEAD, OpenFile};
use crate::protocol::rest::{Ran, ToolResult};
use crate::protocol::rpc::{BLOCK_BYTES_MAX, FsGetMetadata, OpenMode};
use crate::relay::client::{CallError, Client};
use crate::tools::{Effect, Run, Site, Tool, ToolError, before, coded_failure, failure, parse, refused, resolve};
use crate::workspace::pool::Use;

pub(in crate::tools) const TOOL: Tool = Tool {
    name: "read_file",
    description: "Read a file by path.",
    effect: Effect::Reads,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

/// Arguments of `read_file`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// The file; relative paths and `~` are taken on the executor.
    path: String,
    /// First byte; negative is 0.
    #[serde(default)]
    offset: Option<i64>,
    /// Bytes at most; 0 or left out is all.
    #[serde(default)]
    limit: Option<u64>,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// Always `base64`: how the text is to be read.
    encoding: &'static str,
    /// As it was asked for.
    path: String,
    /// Of the whole file, in bytes.
    size: u64,
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let deadline = site.call.deadline(None)?;
    let reading = async {
        let mut client = site.client(Use::Files, deadline).await?;
        let mut way = site.way_back(Use::Files, deadline);
        loop {
            match attempt(&client, &arguments, site.call.settings.output_bytes_max as u64).await {
                // Its handle went with the link, and reading twice does no harm.
                Err(ToolError::Lost { ran }) => client = way.find(&client, ran == Ran::Unknown).await?,
                result => return result,
            }
        }
    };
    before(deadline, reading).await
}

async fn attempt(client: &Client, arguments: &Arguments, bytes_max: u64) -> Result<ToolResult, ToolError> {
    let Arguments { path, offset, limit } = arguments;
    let uri = resolve(client.environment(), "path", path)?;
    let metadata = match refused(client.call(&FsGetMetadata { path: uri.clone() }).await)? {
        Ok(metadata) => metadata,
        Err(error) => return Ok(failure(&TOOL, &error)),
    };
    if metadata.is_directory {
        return Ok(coded_failure("is_a_directory", format!("read_file failed: {path} is a directory")));
    }
    // Opening a pipe or a device could hold up the whole stream at the executor.
    if !metadata.is_file {
        return Ok(coded_failure("not_a_file", format!("read_file failed: {path} is not a regular file")));
    }
    let offset = u64::try_from(offset.unwrap_or(0)).unwrap_or(0);
    let rest = metadata.size.saturating_sub(offset);
    let wanted = limit.filter(|limit| *limit > 0).unwrap_or(u64::MAX);
    if rest.min(wanted) > bytes_max {
        let message = format!(
            "read_file failed: {} bytes are more than one call returns ({bytes_max}); read slices by offset and limit",
            rest.min(wanted)
        );
        return Ok(coded_failure("too_large", message));
    }
    let slice = async {
        let file = OpenFile::open(client, &uri, OpenMode::Read).await?;
        // Files of /proc and the like tell no size: read to the end, within the bound.
        let end = offset.saturating_add(wanted.min(if metadata.size == 0 { bytes_max } else { rest }));
        // Dropping closes: what was read is whole, so nobody needs to wait for that.
        read(&file, offset, end).await
    };
    Ok(match refused(slice.await)? {
        Ok(slice) => ToolResult {
            structured_content: Some(
                serde_json::to_value(Output { encoding: "base64", path: path.clone(), size: metadata.size })
                    .expect("plain data"),
            ),
            ..ToolResult::text(STANDARD.encode(&slice))
        },
        Err(error) => failure(&TOOL, &error),
    })
}

/// Reads `offset..end`, or to the end of the file if that comes first.
async fn read(file: &OpenFile, offset: u64, end: u64) -> Result<Vec<u8>, CallError> {
    let mut at = offset;
    let mut blocks = FuturesOrdered::new();
    let mut bytes = Vec::new();
    loop {
        while at < end && blocks.len() < BLOCKS_AHEAD {
            blocks.push_back(file.read(at, end - at));
            at = at.saturating_add(BLOCK_BYTES_MAX as u64);
        }
        let Some(block) = blocks.try_next().await? else { return Ok(bytes) };
        bytes.extend_from_slice(&block.chunk.0);
        if block.eof {
            return Ok(bytes);
        }
    }
}
