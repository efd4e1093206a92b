//! Memory: refuses new work before the kernel would end the process: past a watermark that is looked at now and then,
//! and at once where large bodies have taken their part. What runs already goes on.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::metrics::Metrics;
use crate::config::{self, Live};

/// Interval of the looks: a flood of bodies is held back by their own bound meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// New work is refused for want of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the gateway is short of memory; try again soon")]
pub struct Overloaded;

/// What the process has taken and may take.
pub struct Memory {
    settings: Live<config::Memory>,
    metrics: Arc<Metrics>,
    high: AtomicBool,
    /// Bytes of bodies and answers in memory.
    held: AtomicU64,
}

/// One bound on the process, and what it has taken of it, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reading {
    used: u64,
    limit: u64,
}

/// Memory for the bodies of one request, given back when it is dropped.
pub struct Held {
    memory: Arc<Memory>,
    bytes: AtomicU64,
}

impl Memory {
    /// Not past the watermark yet.
    pub fn new(settings: Live<config::Memory>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { settings, metrics, high: AtomicBool::new(false), held: AtomicU64::new(0) })
    }

    /// Whether new work that costs memory may begin.
    ///
    /// # Errors
    /// [`Overloaded`] while the process is past its watermark.
    pub fn admit(&self) -> Result<(), Overloaded> {
        if self.is_high() {
            self.metrics.shed.of(["watermark"]).inc();
            return Err(Overloaded);
        }
        Ok(())
    }

    /// Whether the process is past its watermark.
    pub fn is_high(&self) -> bool {
        self.high.load(Ordering::Relaxed)
    }

    /// Bytes of bodies and answers that are in memory.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// For one request, which holds nothing so far.
    pub fn hold(self: &Arc<Self>) -> Arc<Held> {
        Arc::new(Held { memory: self.clone(), bytes: AtomicU64::new(0) })
    }

    /// Looks now and then until `stop`.
    pub async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => self.judge(&readings(self.settings.now().limit_bytes)),
                () = stop.cancelled() => return,
            }
        }
    }

    fn judge(&self, readings: &[Reading]) {
        let settings = self.settings.now();
        // As a share of a million, the fullest first.
        let share = |reading: &Reading| u128::from(reading.used) * 1_000_000 / u128::from(reading.limit.max(1));
        let fullest = readings.iter().max_by_key(|reading| share(reading));
        let percent = fullest.map_or(0, share) / 10_000;
        let high = match (settings.high_percent, self.is_high()) {
            (0, _) => false,
            (_, true) => percent >= u128::from(settings.low_percent),
            (high, false) => percent >= u128::from(high),
        };
        let Reading { used, limit } = fullest.copied().unwrap_or(Reading { used: 0, limit: 0 });
        self.metrics.memory_limit.set(limit);
        self.metrics.memory_high.set(high.into());
        if self.high.swap(high, Ordering::Relaxed) != high {
            match high {
                true => tracing::warn!(used, limit, "memory is past its watermark, so new work is refused"),
                false => tracing::info!(used, limit, "memory is below its watermark again, so new work is taken"),
            }
        }
    }
}

impl Held {
    /// Takes so many more bytes.
    ///
    /// # Errors
    /// [`Overloaded`] when all requests together would hold more than `memory.bodies_bytes_max`; nothing is taken then.
    pub fn grow(&self, bytes: u64) -> Result<(), Overloaded> {
        let bytes_max = self.memory.settings.now().bodies_bytes_max;
        let within = |held: u64| held.checked_add(bytes).filter(|held| *held <= bytes_max);
        if self.memory.held.fetch_update(Ordering::AcqRel, Ordering::Acquire, within).is_err() {
            self.memory.metrics.shed.of(["bodies"]).inc();
            return Err(Overloaded);
        }
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
        Ok(())
    }

    /// The same until it holds so many.
    ///
    /// # Errors
    /// As [`Self::grow`].
    pub fn grow_to(&self, bytes: u64) -> Result<(), Overloaded> {
        self.grow(bytes.saturating_sub(self.bytes.load(Ordering::Acquire)))
    }

    /// Holds exactly that from now on: what is there already cannot be refused.
    pub fn set(&self, bytes: u64) {
        let before = self.bytes.swap(bytes, Ordering::AcqRel);
        self.memory.held.fetch_add(bytes, Ordering::AcqRel);
        self.memory.held.fetch_sub(before, Ordering::AcqRel);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// Every bound on this process that is known. The kernel counts each in its own way.
fn readings(limit_bytes: usize) -> Vec<Reading> {
    let page = rustix::param::page_size() as u64;
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    // Size, resident, shared, text, unused, data (proc(5)).
    let statm: Vec<u64> = statm.split_whitespace().filter_map(|pages| pages.parse().ok()).collect();
    let [size, resident, data] = [0, 1, 5].map(|field| statm.get(field).map_or(0, |pages| pages * page));
    let configured = (limit_bytes > 0).then_some((resident, limit_bytes as u64));
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| number(&text, "MemTotal:"));
    let bounds = [
        configured,
        machine.map(|kib| (resident, kib * 1024)),
        getrlimit(Resource::As).current.map(|limit| (size, limit)),
        getrlimit(Resource::Data).current.map(|limit| (data, limit)),
    ];
    let mut readings: Vec<Reading> =
        bounds.into_iter().flatten().map(|(used, limit)| Reading { used, limit }).collect();
    if let Ok(text) = std::fs::read_to_string("/proc/self/cgroup")
        && let Some(path) = text.lines().find_map(|line| line.strip_prefix("0::/"))
    {
        readings.extend(of_cgroups(Path::new("/sys/fs/cgroup"), Path::new(path)));
    }
    readings
}

/// The bounds of a control group and of those around it. Files that the kernel keeps for itself are no use of memory:
/// it lets go of them.
fn of_cgroups(root: &Path, path: &Path) -> Vec<Reading> {
    let reading = |group: &Path| {
        let read = |file: &str| std::fs::read_to_string(root.join(group).join(file)).ok();
        let limit = |file: &str| read(file)?.trim().parse::<u64>().ok();
        let limit = [limit("memory.max"), limit("memory.high")].into_iter().flatten().min()?;
        let current: u64 = read("memory.current")?.trim().parse().ok()?;
        let files = read("memory.stat").and_then(|text| number(&text, "file")).unwrap_or(0);
        Some(Reading { used: current.saturating_sub(files), limit })
    };
    path.ancestors().filter_map(reading).collect()
}

/// The number behind that word.
fn number(text: &str, word: &str) -> Option<u64> {
    let mut fields = text.lines().map(str::split_whitespace).find(|fields| fields.clone().next() == Some(word))?;
    fields.nth(1)?.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::scratch::ScratchDir;

    fn memory(settings: config::Memory) -> Arc<Memory> {
        Memory::new(settings.into(), Arc::default())
    }

    fn at(percent: u64) -> [Reading; 2] {
        [Reading { used: 1, limit: 1000 }, Reading { used: percent, limit: 100 }]
    }

    #[test]
    fn the_fullest_bound_counts_and_the_watermark_has_a_lower_edge() {
        let memory = memory(config::Memory { high_percent: 80, low_percent: 70, ..config::Memory::default() });
        for (percent, high) in [(79, false), (80, true), (70, true), (69, false), (75, false)] {
            memory.judge(&at(percent));
            assert_eq!((memory.is_high(), memory.admit().is_err()), (high, high), "at {percent} percent");
        }
        memory.judge(&[]);
        assert!(!memory.is_high(), "nothing is known");
    }

    #[test]
    fn without_a_watermark_nothing_is_refused() {
        let memory = memory(config::Memory { high_percent: 0, ..config::Memory::default() });
        memory.judge(&at(100));
        assert!(memory.admit().is_ok());
    }

    #[test]
    fn bodies_hold_what_they_may_and_no_more() {
        let memory = memory(config::Memory { bodies_bytes_max: 100, ..config::Memory::default() });
        let (one, other) = (memory.hold(), memory.hold());
        one.grow(60).unwrap();
        other.grow(40).unwrap();
        assert_eq!(other.grow(1), Err(Overloaded));
        one.set(200);
        assert_eq!(memory.held(), 240, "an answer that is there is counted, not refused");
        drop(one);
        assert_eq!((memory.held(), other.grow(60)), (40, Ok(())));
        drop(other);
        assert_eq!(memory.held(), 0);
    }

    #[test]
    fn control_groups_are_read_up_to_the_root_without_what_the_kernel_can_let_go_of() {
        let root = ScratchDir::new();
        let group = root.path().join("system/gateway");
        std::fs::create_dir_all(&group).unwrap();
        let write = |dir: &Path, file: &str, text: &str| std::fs::write(dir.join(file), text).unwrap();
        write(&group, "memory.max", "max\n");
        write(&group, "memory.high", "1000\n");
        write(&group, "memory.current", "700\n");
        write(&group, "memory.stat", "anon 300\nfile 400\nfile_mapped 7\n");
        write(group.parent().unwrap(), "memory.max", "5000\n");
        write(group.parent().unwrap(), "memory.current", "900\n");
        let expected = [Reading { used: 300, limit: 1000 }, Reading { used: 900, limit: 5000 }];
        assert_eq!(of_cgroups(root.path(), Path::new("system/gateway")), expected);
    }

    #[test]
    fn what_this_process_has_taken_is_known() {
        assert!(readings(1 << 40).iter().any(|reading| reading.limit == 1 << 40 && reading.used > 1 << 20));
    }
}
