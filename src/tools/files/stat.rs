//! `stat`: what is at a path.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Attempts, Failure, FileError, Kind, answer, look, native, time};
use crate::protocol::path::FileUri;
use crate::protocol::rest::ToolResult;
use crate::tools::{Effect, Run, Site, Tool, ToolError, before, parse, resolve};

pub(in crate::tools) const TOOL: Tool = Tool {
    name: "stat",
    description: "Tell what is at a path: kind, size, time of the last change, permissions and owner. Symbolic links \
                  are followed and told as `link_target`; one that leads nowhere has the kind `symlink`.",
    effect: Effect::Reads,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

const LOOK: &str = include_str!("stat.sh");

/// Arguments of `stat`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// What to look at; relative paths and `~` are taken on the executor.
    path: String,
}

/// The structured part of the answer.
#[derive(Debug, PartialEq, Eq, Serialize, JsonSchema)]
struct Output {
    /// As it was asked for.
    path: String,
    /// What it is, links followed.
    kind: Kind,
    /// Bytes.
    size: u64,
    /// When it was last changed, RFC 3339 in UTC.
    mtime: String,
    /// Permissions in octal digits; left out where the executor has no /bin/sh, like the owners.
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<String>,
    /// Id of the owner.
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    /// Id of the owning group.
    #[serde(skip_serializing_if = "Option::is_none")]
    gid: Option<u32>,
    /// What the path itself says, where it is a symbolic link.
    #[serde(skip_serializing_if = "Option::is_none")]
    link_target: Option<String>,
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let deadline = site.call.deadline(None)?;
    let looking = async {
        let mut attempts = Attempts::harmless(site, deadline).await?;
        let uri = resolve(attempts.client().environment(), "path", &arguments.path)?;
        let output = match site.script(LOOK, &[&native(&uri)?], deadline).await? {
            Some(ended) => {
                let said = String::from_utf8_lossy(&ended.stdout);
                told(&arguments.path, &said).ok_or_else(|| Failure::said(&ended))?
            }
            None => loop {
                let attempt = without_shell(&attempts, &uri, &arguments.path).await;
                if let Some(output) = attempts.over(attempt).await {
                    break output?;
                }
            },
        };
        let text = format!("{:?}, {} bytes, changed {}", output.kind, output.size, output.mtime).to_lowercase();
        Ok(answer(output, text))
    };
    before(deadline, async { looking.await.or_else(|error: FileError| error.result(&TOOL)) }).await
}

/// What the script said; nothing where it failed.
fn told(path: &str, said: &str) -> Option<Output> {
    let (facts, link) = said.split_once('\n')?;
    let facts: Vec<&str> = facts.split(' ').collect();
    let &[kind, mode, uid, gid, size, seconds] = facts.as_slice() else { return None };
    let kind = match kind {
        "file" => Kind::File,
        "directory" => Kind::Directory,
        "symlink" => Kind::Symlink,
        _ => Kind::Other,
    };
    Some(Output {
        path: path.to_owned(),
        kind,
        size: size.parse().ok()?,
        mtime: time(seconds.parse::<i64>().ok()?.saturating_mul(1000)),
        mode: Some(format!("{mode:0>4}")),
        uid: uid.parse().ok(),
        gid: gid.parse().ok(),
        link_target: link.strip_suffix('\n').map(str::to_owned),
    })
}

async fn without_shell(attempts: &Attempts<'_>, uri: &FileUri, path: &str) -> Result<Output, FileError> {
    let found = look(attempts.client(), uri).await?.ok_or_else(|| Failure::new("not_found", "nothing is there"))?;
    Ok(Output {
        path: path.to_owned(),
        kind: Kind::of(&found),
        size: found.size,
        mtime: time(found.modified_at_ms),
        mode: None,
        uid: None,
        gid: None,
        link_target: None,
    })
}
