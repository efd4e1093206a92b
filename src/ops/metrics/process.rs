//! What the system knows of this process, under the names that every program gives it. Read from `/proc` at each scrape.

use std::fs;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};

use super::Metrics;

/// Reads all of it; what cannot be read stays as it was.
pub(super) fn read(metrics: &Metrics) {
    if let Some(stat) = fs::read_to_string("/proc/self/stat").ok().as_deref().and_then(Stat::parse) {
        metrics.process_cpu.set(micros(stat.cpu));
        metrics.process_threads.set(stat.threads);
        metrics.process_virtual_memory.set(stat.virtual_bytes);
        metrics.process_resident_memory.set(stat.resident_pages * rustix::param::page_size() as u64);
        if let Some(booted) = fs::read_to_string("/proc/stat").ok().as_deref().and_then(booted) {
            metrics.process_start_time.set(micros(booted + stat.started));
        }
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // One of them is the directory's own.
        metrics.process_open_fds.set((open.count() as u64).saturating_sub(1));
    }
    metrics.process_max_fds.set(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX));
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// What of `/proc/self/stat` is of interest (proc(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    cpu: Duration,
    threads: u64,
    /// Since the machine was started.
    started: Duration,
    virtual_bytes: u64,
    resident_pages: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The name of the program stands in parentheses and may hold anything, these included.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        // Counted as the manual does, which begins at 1; the first after the name is the third.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let ticks = |count: u64| Duration::from_millis(count * 1000 / rustix::param::clock_ticks_per_second());
        Some(Self {
            cpu: ticks(field(14)? + field(15)?),
            threads: field(20)?,
            started: ticks(field(22)?),
            virtual_bytes: field(23)?,
            resident_pages: field(24)?,
        })
    }
}

/// When the machine was started, as Unix time.
fn booted(stat: &str) -> Option<Duration> {
    let seconds = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    Some(Duration::from_secs(seconds.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_may_have_any_name() {
        let line = "42 (a) b (c) S 1 42 42 0 -1 0 0 0 0 0 250 50 0 0 20 0 7 0 1000 4096000 300 0";
        let stat = Stat::parse(line).map(|stat| (stat.threads, stat.virtual_bytes, stat.resident_pages));
        assert_eq!(stat, Some((7, 4_096_000, 300)));
        assert_eq!(Stat::parse("42 (cut"), None);
    }
}
