//! `find_files`: paths below a directory, by a glob.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::walk::{Excluded, Pattern, Wanted, find, read};
use super::{Attempts, FileError, answer, look_at_directory};
use crate::protocol::rest::ToolResult;
use crate::tools::{Effect, Run, Site, Tool, ToolError, before, parse, resolve};

pub(in crate::tools) const TOOL: Tool = Tool {
    name: "find_files",
    description: "Find files below a directory by a glob: `*` and `?` stay within one name, `**` goes through \
                  directories, `[a-z]`, `{a,b}` and `\\` are known. A pattern without a slash fits names at any depth \
                  (`*.rs`), one with a slash the path from the directory (`src/**/*.rs`). Hidden files are found, \
                  links are not followed, `.git` is left out unless `exclude` says otherwise. Returns the paths \
                  relative to the directory, sorted, at most `limit`; `truncated` tells that there are more.",
    effect: Effect::Reads,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

const LIMIT: usize = 500;
const LIMIT_MAX: usize = 10_000;

/// Arguments of `find_files`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// The glob.
    pattern: String,
    /// Where to look; the executor's working directory when left out.
    #[serde(default)]
    path: Option<String>,
    /// `file` when left out.
    #[serde(default)]
    kind: Sort,
    /// Names that are left out with all below them, as globs; `[".git"]` when left out.
    #[serde(default)]
    exclude: Option<Vec<String>>,
    /// Paths at most; 500 when left out, at most 10000.
    #[serde(default)]
    limit: Option<usize>,
}

/// What is looked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Sort {
    /// Files and links.
    #[default]
    File,
    /// Directories.
    Directory,
    /// All that has a name.
    Any,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// Relative to the directory, with slashes, sorted.
    paths: Vec<String>,
    /// Whether there are more.
    truncated: bool,
    /// Directories that may not be read.
    #[serde(skip_serializing_if = "is_zero")]
    unreadable: usize,
}

/// Whether a count need not be told.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
pub(super) fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// A number within its bounds.
///
/// # Errors
/// [`ToolError::Arguments`].
pub(super) fn bounded(field: &str, given: Option<usize>, default: usize, max: usize) -> Result<usize, ToolError> {
    match given.unwrap_or(default) {
        0 => Err(ToolError::Arguments(format!("{field}: expected 1 to {max}"))),
        given if given > max => Err(ToolError::Arguments(format!("{field}: expected 1 to {max}"))),
        given => Ok(given),
    }
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let pattern = Pattern::parse("pattern", &arguments.pattern)?;
    let excluded = Excluded::parse(arguments.exclude)?;
    let limit = bounded("limit", arguments.limit, LIMIT, LIMIT_MAX)?;
    let wanted = match arguments.kind {
        Sort::File => Wanted::Files,
        Sort::Directory => Wanted::Directories,
        Sort::Any => Wanted::Any,
    };
    let deadline = site.call.deadline(None)?;
    let finding = async {
        let mut attempts = Attempts::harmless(site, deadline).await?;
        let path = arguments.path.as_deref().unwrap_or(".");
        let directory = resolve(attempts.client().environment(), "path", path)?;
        loop {
            let attempt = look_at_directory(attempts.client(), &directory).await;
            if let Some(looked) = attempts.over(attempt).await {
                break looked?;
            }
        }
        let mut found = match find(site, &directory, wanted, &pattern, &excluded, deadline).await? {
            Some(found) => found,
            None => loop {
                let attempt = read(attempts.client(), &directory, wanted, &pattern, &excluded).await;
                if let Some(found) = attempts.over(attempt).await {
                    break found?;
                }
            },
        };
        let truncated = found.cut || found.paths.len() > limit;
        found.paths.truncate(limit);
        let mut text = found.paths.join("\n");
        if found.paths.is_empty() {
            text.push_str("nothing found");
        }
        if truncated {
            text.push_str("\n[there are more]");
        }
        Ok(answer(Output { paths: found.paths, truncated, unreadable: found.unreadable }, text))
    };
    before(deadline, async { finding.await.or_else(|error: FileError| error.result(&TOOL)) }).await
}
