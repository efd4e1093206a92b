//! Every metric of the gateway in one table: name, kind, unit, labels with their values, and what it says.
//!
//! `/metrics` prints it, `deploy/METRICS.md` is generated from it, and the dashboard and the alerts in `deploy/` are
//! compared with it. No label holds an id, a path or a tenant's name.

mod page;
mod process;
mod series;

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit as Suffix};

use self::Values::{Rule, Words};
use self::series::Series;
pub use self::series::{By, Held, Number, Times};
use crate::edge::router::Route;
use crate::timing::{Observer, Phase, Spent};

/// One row of the table.
#[derive(Debug)]
pub struct Metric {
    /// Under which heading it stands.
    pub section: &'static str,
    field: &'static str,
    /// What it counts.
    pub kind: Kind,
    /// In which unit.
    pub unit: Unit,
    /// By what it is told apart.
    pub labels: &'static [Label],
    help: &'static [&'static str],
}

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, until the process ends.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts durations by how long they were.
    Histogram,
}

/// In which unit a metric is, always the base unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Things.
    None,
    /// Bytes.
    Bytes,
    /// Seconds.
    Seconds,
}

/// One label.
#[derive(Debug)]
pub struct Label {
    /// Its name.
    pub name: &'static str,
    /// What it may be.
    pub values: Values,
}

/// The values of a label: few, and known when the gateway is built.
#[derive(Debug, Clone, Copy)]
pub enum Values {
    /// These.
    Words(&'static [&'static str]),
    /// What this sentence says.
    Rule(&'static str),
}

impl Values {
    fn words(self) -> Option<&'static [&'static str]> {
        match self {
            Words(words) => Some(words),
            Rule(_) => None,
        }
    }
}

impl Metric {
    /// Its name without the ending of its unit and kind.
    fn stem(&self) -> String {
        // Those of the process have the names that every program gives them.
        if self.field.starts_with("process_") { self.field.into() } else { format!("exec_gateway_{}", self.field) }
    }

    /// Its name as it is scraped; the series of a histogram have further endings.
    pub fn name(&self) -> String {
        let unit = match self.unit {
            Unit::None => "",
            Unit::Bytes => "_bytes",
            Unit::Seconds => "_seconds",
        };
        let kind = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{}{unit}{kind}", self.stem())
    }

    /// What it says, on one line.
    pub fn help(&self) -> String {
        self.help.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
    }

    fn print(&self, series: &dyn Series, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
            Kind::Histogram => MetricType::Histogram,
        };
        let unit = match self.unit {
            Unit::None => None,
            Unit::Bytes => Some(Suffix::Bytes),
            Unit::Seconds => Some(Suffix::Seconds),
        };
        series.print(self, &mut encoder.encode_descriptor(&self.stem(), &self.help(), unit.as_ref(), kind)?)
    }
}

/// Makes [`Metrics`] and [`TABLE`] of the rows, so that neither has what the other lacks.
macro_rules! table {
    ($($section:literal {
        $($(#[doc = $help:literal])+ $field:ident: $kind:ident $($unit:ident)? $({ $($label:ident: $values:expr),+ })?;)+
    })+) => {
        /// Every metric, in the order in which they are printed.
        pub const TABLE: &[Metric] = &[$($(Metric {
            section: $section,
            field: stringify!($field),
            kind: kind!($kind),
            unit: unit!($($unit)?),
            labels: &[$($(Label { name: stringify!($label), values: $values }),+)?],
            help: &[$($help),+],
        }),+),+];

        /// The gateway's numbers. Those that other parts know themselves are set at each scrape.
        #[derive(Debug)]
        pub struct Metrics {
            $($($(#[doc = $help])+ pub $field: series!($kind $($($label)+)?),)+)+
        }

        impl Metrics {
            fn series(&self) -> impl Iterator<Item = &dyn Series> {
                [$($(&self.$field as &dyn Series),+),+].into_iter()
            }
        }

        impl Default for Metrics {
            fn default() -> Self {
                let metrics = Self { $($($field: Default::default()),+),+ };
                TABLE.iter().zip(metrics.series()).for_each(|(metric, series)| series.preset(metric));
                metrics
            }
        }
    };
}

macro_rules! kind {
    (counter) => {
        Kind::Counter
    };
    (gauge) => {
        Kind::Gauge
    };
    (histogram) => {
        Kind::Histogram
    };
}

macro_rules! unit {
    () => {
        Unit::None
    };
    (bytes) => {
        Unit::Bytes
    };
    (seconds) => {
        Unit::Seconds
    };
}

macro_rules! series {
    (histogram) => { Times };
    (histogram $($label:ident)+) => { By<Times, { [$(stringify!($label)),+].len() }> };
    ($kind:ident) => { Number };
    ($kind:ident $($label:ident)+) => { By<Number, { [$(stringify!($label)),+].len() }> };
}

/// Doors whose requests say where their time goes.
const DOORS: Values = Words(&["rest", "mcp", "files", "processes"]);
const TOOL: Values = Rule("the name of a tool");
const CODE: Values = Rule("`ok`, `failed` where the tool itself says so, or the code of an error");

// To add a metric, add its row here, change its field where the thing happens (or, if it is known elsewhere, in
// `gateway::read`), run the tests with REWRITE=1 for the page, and let a scenario of tests/metrics.rs see it move.
table! {
    "Calls" {
        /// Tool calls that have ended, by whichever door they came.
        calls: counter { tool: TOOL, outcome: CODE };
        /// Tool calls under way.
        calls_open: gauge;
        /// How long tool calls took, from their record in the audit to their result.
        call_duration: histogram seconds { tool: TOOL };
        /// Where the time of requests went, as their `Server-Timing` says: checking the credential, the gateway's own
        /// work, waiting for a conversation with the executor, and the executor's work.
        request_phase_duration: histogram seconds { door: DOORS, phase: Words(Phase::NAMES) };
        /// How long requests took that say where their time goes, from their head to the end of all work on them.
        request_duration: histogram seconds { door: DOORS };
        /// Messages of MCP clients.
        mcp_messages: counter { method: Words(MCP_METHODS) };
    }
    "HTTP" {
        /// Requests by the endpoint that answered and the class of the status; `none` is a path that is no endpoint.
        http_requests: counter { route: Words(Route::NAMES), status: Words(&["1xx", "2xx", "3xx", "4xx", "5xx"]) };
        /// Panics of tasks; each ended one connection or one conversation. Every one is a fault of the program.
        panics: counter;
    }
    "Executors and links" {
        /// Executor registrations by outcome.
        registrations: counter { outcome: Rule("`ok`, or the code of an error") };
        /// Connected executors.
        links: gauge { transport: TRANSPORTS };
        /// Executor sockets by how they ended.
        links_ended: counter { outcome: Words(LINK_ENDS) };
        /// Harness sockets by how they ended.
        harnesses_ended: counter { outcome: Words(HARNESS_ENDS) };
        /// Frames dropped as undecodable or misplaced.
        frames_dropped: counter;
        /// Streams reset because their reader was too slow.
        streams_overrun: counter;
        /// Bytes for slow harnesses written to disk.
        spilled: counter bytes;
        /// Frames refused because a harness was too far behind.
        spill_overruns: counter;
    }
    "Process sessions" {
        /// Process sessions, ended ones that can still be read included.
        sessions: gauge { state: Words(SESSION_STATES) };
    }
    "Credentials" {
        /// Proxy tokens answered from memory.
        token_hits: counter;
        /// Refused proxy tokens answered from memory.
        token_negative_hits: counter;
        /// Proxy tokens that had to be looked up.
        token_misses: counter;
        /// Proxy tokens believed while the validator upstream failed.
        token_stale: counter;
        /// Questions to the validator upstream.
        upstream_requests: counter;
        /// Questions that the validator upstream did not answer.
        upstream_failures: counter;
    }
    "Workspaces and transfers" {
        /// Workspaces in memory.
        workspaces: gauge;
        /// Workspaces built on first use.
        workspaces_built: counter;
        /// Workspaces dropped when idle, or for want of room.
        workspaces_evicted: counter;
        /// Transfers that wait for a side or carry bytes.
        transfers: gauge;
    }
    "Audit" {
        /// Records that were written.
        audit_records: counter;
        /// Records that could not be written.
        audit_missing: counter;
        /// Calls refused since they could not be recorded.
        audit_refused: counter;
        /// Size of the audit log on disk.
        audit: gauge bytes;
        /// Whether the audit log took no record when last tried.
        audit_failing: gauge;
    }
    "Limits and reloads" {
        /// Reloads of the configuration; those that were refused changed nothing, since something was wrong.
        reloads: counter { outcome: Words(&["done", "refused"]) };
        /// Requests refused since their workspace asks too often.
        rate_limited: counter;
        /// New work refused for want of memory: since the process is past its watermark, or since the bodies that it
        /// holds have taken all that they may.
        shed: counter { cause: Words(&["watermark", "bodies"]) };
        /// Whether new work is refused at the moment, since the process is past its watermark.
        memory_high: gauge;
        /// What the process may take, as far as is known; 0 where nothing says so.
        memory_limit: gauge bytes;
        /// What request bodies have taken of what they may.
        body_memory: gauge bytes;
    }
    "Process" {
        /// The program that runs; always 1.
        build_info: gauge { version: Rule("the version of the program") };
        /// Tasks of the runtime that are alive.
        tasks: gauge;
        /// Processor time used.
        process_cpu: counter seconds;
        /// Memory that is in use and not swapped out.
        process_resident_memory: gauge bytes;
        /// Address space that is mapped.
        process_virtual_memory: gauge bytes;
        /// Threads.
        process_threads: gauge;
        /// Open file descriptors.
        process_open_fds: gauge;
        /// File descriptors that may be open.
        process_max_fds: gauge;
        /// When the process began, as Unix time.
        process_start_time: gauge seconds;
    }
}

/// How executors are spoken to.
const TRANSPORTS: Values = Words(&["noise", "relay", "direct", "agentx"]);

const LINK_ENDS: &[&str] = &["peer", "silent", "write_timeout", "failed", "stalled", "draining", "replaced", "deleted"];

const HARNESS_ENDS: &[&str] = &[
    "peer",
    "silent",
    "protocol",
    "too_large",
    "disconnected",
    "reset",
    "unreachable",
    "draining",
    "refused",
    "replaced",
    "overrun",
    "unresumable",
];

const SESSION_STATES: &[&str] = &["starting", "running", "exited", "failed", "lost", "unknown"];

const MCP_METHODS: &[&str] = &["initialize", "tools/list", "tools/call", "ping", "notification", "other"];

impl Metrics {
    /// What `/metrics` prints, in the text format of OpenMetrics.
    pub fn printer(self: &Arc<Self>) -> Printer {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Table(self.clone())));
        Printer(registry)
    }

    /// Reads what the system knows of this process.
    pub fn read_process(&self) {
        process::read(self);
    }
}

impl Observer for Metrics {
    fn ended(&self, door: &'static str, spent: Spent) {
        for (phase, time) in spent {
            self.request_phase_duration.of([door, phase.name()]).observe(time);
        }
        self.request_duration.of([door]).observe(spent.iter().map(|(_, time)| *time).sum());
    }
}

/// Prints metrics as they are at that moment.
#[derive(Debug)]
pub struct Printer(Registry);

impl fmt::Display for Printer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        encode(f, &self.0)
    }
}

#[derive(Debug)]
struct Table(Arc<Metrics>);

impl Collector for Table {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        TABLE.iter().zip(self.0.series()).try_for_each(|(metric, series)| metric.print(series, &mut encoder))
    }
}
