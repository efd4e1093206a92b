//! `write_file`: the whole content of a file, seen by nobody before it is complete (connectors-api.md §4.3).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::staging::{Change, Expect, Outcome, Put, Staged, commit, sha256};
use super::{Attempts, FileError, answer};
use crate::protocol::rest::ToolResult;
use crate::tools::{Effect, Run, Site, Tool, ToolError, before, parse, resolve};

pub(in crate::tools) const TOOL: Tool = Tool {
    name: "write_file",
    description: "Write the whole content of a file: a new one, or in the place of the former content. Readers see the \
                  old content or the new one, never a part; permissions and symbolic links stay. Give `content` for \
                  text or `content_b64` for any bytes. With `if_match` it is written only if nobody has changed the \
                  file since you read it: pass the sha256 you were given, `none` to create only, `*` to replace only. \
                  Returns bytes, sha256 and whether the file was created. To change a part of a file use edit_file.",
    effect: Effect::Destroys,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

/// Arguments of `write_file`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// The file; relative paths and `~` are taken on the executor.
    path: String,
    /// Its whole content in standard base64 with padding; left out, with `content` too, is an empty file.
    #[serde(default)]
    content_b64: Option<String>,
    /// Its whole content as text; instead of `content_b64`.
    #[serde(default)]
    content: Option<String>,
    /// Whether missing directories of the path are made.
    #[serde(default)]
    create_parents: bool,
    /// Permissions in octal digits, as `755`; left out, those of the former file, or 644 less the executor's umask.
    #[serde(default)]
    mode: Option<String>,
    /// What has to be there: the SHA-256 of the present content in hexadecimal, `*` for any file, `none` for no file.
    #[serde(default)]
    if_match: Option<String>,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// Bytes written.
    bytes: usize,
    /// SHA-256 of the content, for a later `if_match`.
    sha256: String,
    /// Whether there was no file before.
    created: bool,
    /// Whether a reader sees the old file or the new one, and never a part; false only on executors without /bin/sh.
    atomic: bool,
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let Arguments { path, content_b64, content, create_parents, mode, if_match } = arguments;
    let content = match (content_b64, content) {
        (Some(_), Some(_)) => {
            return Err(ToolError::Arguments("content: expected either content or content_b64".into()));
        }
        (Some(base64), None) => STANDARD
            .decode(base64)
            .map_err(|_| ToolError::Arguments("content_b64: expected standard base64 with padding".into()))?,
        (None, text) => text.unwrap_or_default().into_bytes(),
    };
    let (mode, expect) = (permissions(mode)?, expectation(if_match)?);
    let deadline = site.call.deadline(None)?;
    let writing = async {
        let mut attempts = Attempts::harmless(site, deadline).await?;
        let change = loop {
            let staging = async {
                let client = attempts.client();
                let target = resolve(client.environment(), "path", &path)?;
                let staged = Staged::whole(site, client, &target, create_parents, &content).await?;
                Ok(Change { target, put: Some(Put { staged, mode, parents: create_parents }), expect: expect.clone() })
            };
            let attempt = staging.await;
            if let Some(staged) = attempts.over(attempt).await {
                break staged?;
            }
        };
        let committed = commit(site, vec![change], deadline).await?.map_err(|refused| refused.failure)?;
        let created = committed.outcomes == [Outcome::Created];
        let output = Output { bytes: content.len(), sha256: sha256(&content), created, atomic: committed.atomic };
        Ok(answer(output, "ok"))
    };
    before(deadline, async { writing.await.or_else(|error: FileError| error.result(&TOOL)) }).await
}

/// Permission bits as callers write them.
///
/// # Errors
/// [`ToolError::Arguments`].
pub(super) fn permissions(mode: Option<String>) -> Result<Option<u32>, ToolError> {
    let wrong = || ToolError::Arguments("mode: expected octal digits from 0 to 7777".into());
    let Some(mode) = mode else { return Ok(None) };
    let bits = u32::from_str_radix(&mode, 8).ok().filter(|bits| *bits <= 0o7777 && !mode.starts_with('+'));
    bits.map(Some).ok_or_else(wrong)
}

/// An `if_match` as callers write it.
///
/// # Errors
/// [`ToolError::Arguments`].
pub(super) fn expectation(if_match: Option<String>) -> Result<Expect, ToolError> {
    Ok(match if_match.as_deref() {
        None => Expect::Anything,
        Some("none") => Expect::Missing,
        Some("*") => Expect::Present,
        Some(hash) if hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            Expect::Content(hash.to_ascii_lowercase())
        }
        Some(_) => {
            let message = "if_match: expected a SHA-256 in 64 hexadecimal digits, `*` or `none`";
            return Err(ToolError::Arguments(message.into()));
        }
    })
}
