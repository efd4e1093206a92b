//! Codex: the real executor that `demo` runs, as a program that is found or fetched, and as a process that ends with
//! its owner. It knows nothing of gateways beyond the command line that connects an executor to one.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// The version that the demo is made for and fetches.
pub const VERSION: &str = "0.169.0";

/// How the credential is given. A codex that does not know it is older than the executor's protocol.
const BEARER_FLAG: &str = "--registration-bearer-stdin";

/// Time for a program to tell its version or its options; on a busy machine Node alone takes seconds to start.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);

/// Time for an executor to end its commands and itself before it is killed.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// Lines of standard error kept, and characters of each: enough to show why an executor gave up.
const LINES_KEPT: usize = 8;
const LINE_CHARS_MAX: usize = 400;

/// Variables passed on to the executor. Everything else could change what it does: proxies, keys, other gateways.
const ENVIRONMENT_KEPT: [&str; 9] = ["PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "TMPDIR"];

/// A codex program that can be an executor.
pub struct Codex {
    program: PathBuf,
    /// What it calls itself, like `0.169.0`.
    pub version: String,
}

impl Codex {
    /// The program at `given`; without, the first on PATH that works; else the one in the cache, which npm fills.
    /// Cancelling ends what it started and leaves no half of an installation.
    ///
    /// # Errors
    /// The given program is no executor, or there is none and none can be fetched.
    pub async fn find(given: Option<&Path>) -> anyhow::Result<Self> {
        if let Some(program) = given {
            // The executor is started in another directory.
            let program = std::path::absolute(program)?;
            return Self::probe(&program).await.with_context(|| format!("{} is no codex", program.display()));
        }
        for directory in std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()) {
            let program = directory.join("codex");
            if !program.is_file() {
                continue;
            }
            let program = std::path::absolute(program)?;
            match Self::probe(&program).await {
                Ok(codex) => return Ok(codex),
                Err(error) => eprintln!("{} cannot be the executor: {error:#}", program.display()),
            }
        }
        let cache = cache_directory().context("no codex on PATH, and HOME, below which one is kept, is not set")?;
        Ok(Self { program: cached(&cache).await?, version: VERSION.into() })
    }

    /// Whether the program knows how to be an executor, asked by its help.
    async fn probe(program: &Path) -> anyhow::Result<Self> {
        let help = output(program, &["exec-server", "--help"]).await?;
        if !help.contains(BEARER_FLAG) {
            bail!("its exec-server has no {BEARER_FLAG}");
        }
        let version = output(program, &["--version"]).await?;
        let version = version.split_whitespace().last().unwrap_or("unknown").to_owned();
        Ok(Self { program: program.to_owned(), version })
    }

    /// Starts an executor that registers at the gateway. Its own files are below `home`, it works in `directory`.
    ///
    /// # Errors
    /// The program does not start.
    pub async fn start(
        &self,
        gateway: &str,
        executor: &str,
        token: &str,
        home: &Path,
        directory: &Path,
    ) -> anyhow::Result<Process> {
        let kept = ENVIRONMENT_KEPT.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
        let mut command = Command::new(&self.program);
        command
            .args(["exec-server", "--remote", gateway, "--environment-id", executor, BEARER_FLAG])
            .env_clear()
            .envs(kept)
            .env("CODEX_HOME", home)
            .env("NO_PROXY", "127.0.0.1,localhost")
            .env("NO_COLOR", "1")
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut process =
            Process::spawn(command, Some(token)).with_context(|| format!("{}", self.program.display()))?;
        if let Some(mut stdin) = process.child.stdin.take() {
            // An executor that ended already says why on its standard error.
            let _ = stdin.write_all(format!("{token}\n").as_bytes()).await;
        }
        Ok(process)
    }
}

/// A program in a process group of its own, since codex's launcher has a native child. Dropping it kills the group.
pub struct Process {
    child: Child,
    group: Option<Pid>,
    lines: Arc<Mutex<VecDeque<String>>>,
    reading: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts the command; the secret it is given is struck out of what it says.
    fn spawn(mut command: Command, secret: Option<&str>) -> std::io::Result<Self> {
        let mut child = command.process_group(0).kill_on_drop(true).spawn()?;
        let group = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let lines = Arc::new(Mutex::new(VecDeque::new()));
        let reading = child.stderr.take().map(|stderr| {
            let (lines, mut reader) = (lines.clone(), BufReader::new(stderr).lines());
            let secret = secret.map(str::to_owned);
            tokio::spawn(async move {
                while let Ok(Some(line)) = reader.next_line().await {
                    let line = secret.as_ref().map_or(line.clone(), |secret| line.replace(secret.as_str(), "***"));
                    let line = line.chars().take(LINE_CHARS_MAX).collect();
                    let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                    if lines.len() == LINES_KEPT {
                        lines.pop_front();
                    }
                    lines.push_back(line);
                }
            })
        });
        Ok(Self { child, group, lines, reading })
    }

    /// Returns when the program has ended by itself and its last words are read. Cancelling changes nothing.
    pub async fn ended(&mut self) -> std::io::Result<ExitStatus> {
        let status = self.child.wait().await;
        if let Some(reading) = &mut self.reading {
            // A child of the program may hold its standard error open for longer.
            let _ = timeout(END_TIMEOUT, reading).await;
            self.reading = None;
        }
        status
    }

    /// The last lines it wrote to standard error, indented, or nothing.
    pub fn last_lines(&self) -> String {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|line| format!("\n    {line}")).collect()
    }

    /// Asks the group to end, gives it a moment, and kills what is left.
    pub async fn end(mut self) {
        self.signal(Signal::TERM);
        let _ = timeout(END_TIMEOUT, self.child.wait()).await;
        self.signal(Signal::KILL);
        let _ = timeout(END_TIMEOUT, self.child.wait()).await;
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = self.group {
            // Nobody left in the group is what was wanted.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// A directory of this process alone, removed with the value.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes a new directory with that beginning of its name, which only this user can open. The name stays short:
    /// the path of a socket inside has room for about a hundred bytes.
    ///
    /// # Errors
    /// Those of the file system; a directory of that name that exists already is not used.
    pub fn new(prefix: &Path) -> anyhow::Result<Self> {
        let mut path = prefix.as_os_str().to_owned();
        path.push(format!("-{:08x}", uuid::Uuid::new_v4().as_fields().0));
        let path = PathBuf::from(path);
        let parent = path.parent().unwrap_or(Path::new("/"));
        let made = std::fs::create_dir_all(parent).and_then(|()| DirBuilder::new().mode(0o700).create(&path));
        made.with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A directory inside.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn make(&self, name: &str) -> std::io::Result<PathBuf> {
        let path = self.0.join(name);
        std::fs::create_dir(&path)?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A killed process may make one more file before it is gone, and a directory with one cannot be removed.
        for _ in 0..20 {
            match std::fs::remove_dir_all(&self.0) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                _ => return,
            }
        }
        eprintln!("{} could not be removed", self.0.display());
    }
}

/// What a program prints when asked something, if it succeeds.
async fn output(program: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let asked = format!("`{} {}`", program.file_name().unwrap_or_default().display(), arguments.join(" "));
    let output = timeout(PROBE_TIMEOUT, command.output()).await.with_context(|| format!("{asked} does not end"))?;
    let output = output.with_context(|| format!("{asked} does not start"))?;
    if !output.status.success() {
        bail!("{asked} failed: {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where a fetched codex is kept.
fn cache_directory() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    // A relative value is to be ignored (XDG base directory specification).
    let cache =
        set("XDG_CACHE_HOME").filter(|path| path.is_absolute()).or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(cache.join("exec-gateway").join(format!("codex-{VERSION}")))
}

/// The program in the cache; npm fetches it first if it is not there.
async fn cached(cache: &Path) -> anyhow::Result<PathBuf> {
    let program = |directory: &Path| directory.join("node_modules/.bin/codex");
    if program(cache).exists() {
        return Ok(program(cache));
    }
    if !on_path("npm") {
        bail!("no codex on PATH, and no npm to fetch one with: install either, or name a codex by --codex FILE");
    }
    eprintln!("fetching codex {VERSION} by npm into {} …", cache.display());
    // Beside its place, so that it can be renamed there when it is whole.
    let fetched = Scratch::new(cache)?;
    let mut command = Command::new("npm");
    command
        .args(["install", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error", "--prefix"])
        .arg(fetched.path())
        .arg(format!("@openai/codex@{VERSION}"))
        .current_dir(fetched.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut npm = Process::spawn(command, None).context("npm does not start")?;
    let status = npm.ended().await.context("npm")?;
    if !status.success() || !program(fetched.path()).exists() {
        bail!("npm could not fetch codex ({status}){}", npm.last_lines());
    }
    if let Err(error) = std::fs::rename(fetched.path(), cache) {
        // Another demo was quicker, or an unusable directory is in the way.
        if !program(cache).exists() {
            std::fs::remove_dir_all(cache)?;
            std::fs::rename(fetched.path(), cache).with_context(|| format!("{}: {error}", cache.display()))?;
        }
    }
    Ok(program(cache))
}

fn on_path(program: impl AsRef<OsStr>) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program.as_ref()).is_file())
}
