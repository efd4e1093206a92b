//! `list_directory`: what a directory holds, page by page.

use futures_util::StreamExt;
use futures_util::stream;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::find_files::bounded;
use super::{Attempts, FileError, Kind, answer, look, look_at_directory, time};
use crate::protocol::path::FileUri;
use crate::protocol::rest::ToolResult;
use crate::protocol::rpc::{DirectoryEntry, FsReadDirectory};
use crate::relay::client::Client;
use crate::tools::{Effect, Run, Site, Tool, ToolError, before, parse, resolve};

pub(in crate::tools) const TOOL: Tool = Tool {
    name: "list_directory",
    description: "List what a directory holds, hidden entries too, sorted by name: kind, size and time of the last \
                  change of each, links followed. At most `limit` entries; where there are more, `next_cursor` is \
                  the `cursor` of the next call. To look into directories below use find_files.",
    effect: Effect::Reads,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

const LIMIT: usize = 200;
const LIMIT_MAX: usize = 1000;

/// Entries that are looked at at once: others use the stream too.
const LOOKS_AHEAD: usize = 16;

/// Arguments of `list_directory`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// The directory; the executor's working directory when left out. Relative paths and `~` are taken there.
    #[serde(default)]
    path: Option<String>,
    /// Where to go on: `next_cursor` of the call before.
    #[serde(default)]
    cursor: Option<String>,
    /// Entries at most; 200 when left out, at most 1000.
    #[serde(default)]
    limit: Option<usize>,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// Sorted by name.
    entries: Vec<Entry>,
    /// Entries of the whole directory.
    total: usize,
    /// Whether there are more behind the last one.
    truncated: bool,
    /// The name of the last one, where there are more.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_cursor: Option<String>,
}

/// One entry.
#[derive(Serialize, JsonSchema)]
struct Entry {
    /// Its name.
    name: String,
    /// What it is, links followed.
    kind: Kind,
    /// Bytes, of a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    /// When it was last changed, RFC 3339 in UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    mtime: Option<String>,
    /// Whether it is a symbolic link.
    link: bool,
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let limit = bounded("limit", arguments.limit, LIMIT, LIMIT_MAX)?;
    let deadline = site.call.deadline(None)?;
    let listing = async {
        let mut attempts = Attempts::harmless(site, deadline).await?;
        let output = loop {
            let attempt = attempt(attempts.client(), &arguments, limit).await;
            if let Some(listed) = attempts.over(attempt).await {
                break listed?;
            }
        };
        let text = text(&output);
        Ok(answer(output, text))
    };
    before(deadline, async { listing.await.or_else(|error: FileError| error.result(&TOOL)) }).await
}

async fn attempt(client: &Client, arguments: &Arguments, limit: usize) -> Result<Output, FileError> {
    let directory = resolve(client.environment(), "path", arguments.path.as_deref().unwrap_or("."))?;
    look_at_directory(client, &directory).await?;
    let mut listed = client.call(&FsReadDirectory { path: directory.clone() }).await?.entries;
    let total = listed.len();
    if let Some(cursor) = &arguments.cursor {
        listed.retain(|entry| entry.file_name > *cursor);
    }
    listed.sort_unstable_by(|a, b| a.file_name.cmp(&b.file_name));
    let truncated = listed.len() > limit;
    listed.truncate(limit);
    let next_cursor = listed.last().filter(|_| truncated).map(|entry| entry.file_name.clone());
    let looks = listed.into_iter().map(|listed| entry(client, &directory, listed));
    let looked: Vec<_> = stream::iter(looks).buffered(LOOKS_AHEAD).collect().await;
    let entries = looked.into_iter().collect::<Result<Vec<_>, _>>()?;
    Ok(Output { entries, total, truncated, next_cursor })
}

async fn entry(client: &Client, directory: &FileUri, listed: DirectoryEntry) -> Result<Entry, FileError> {
    let found = match look(client, &directory.child(&listed.file_name)).await {
        Ok(found) => found,
        // Known by its name only: a loop of links, or a directory that may be listed and not entered.
        Err(FileError::Failed(_)) => None,
        Err(error) => return Err(error),
    };
    let name = listed.file_name;
    Ok(match found {
        Some(found) => {
            let kind = Kind::of(&found);
            let size = (kind == Kind::File).then_some(found.size);
            Entry { name, kind, size, mtime: Some(time(found.modified_at_ms)), link: found.is_symlink }
        }
        None => Entry { name, kind: Kind::Symlink, size: None, mtime: None, link: true },
    })
}

fn text(output: &Output) -> String {
    let mut text = String::new();
    for Entry { name, kind, size, link, .. } in &output.entries {
        let mark = match kind {
            Kind::Directory => "/",
            Kind::Symlink => "@ (leads nowhere)",
            Kind::File if *link => "@",
            Kind::File | Kind::Other => "",
        };
        let size = size.map_or(String::new(), |size| format!("  {size}"));
        text.push_str(&format!("{name}{mark}{size}\n"));
    }
    if output.truncated {
        text.push_str(&format!("[{} of {}; go on with the cursor]\n", output.entries.len(), output.total));
    }
    if output.total == 0 {
        text.push_str("empty\n");
    }
    text
}
