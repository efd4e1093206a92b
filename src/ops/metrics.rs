//! Every metric of the gateway in one table: name, kind, unit, labels with their values, and what it says.
//!
//! `/metrics` prints it, `deploy/METRICS.md` is generated from it, and the dashboard and the alerts in `deploy/` are
//! compared with it. No label holds an id, a path or a tenant's name.

mod metric;
mod page;
mod process;
mod series;

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use self::Values::{Rule, Words};
pub use self::metric::{Kind, Label, Metric, Unit, Values};
use self::series::Series;
pub use self::series::{By, Held, Number, Times};
use crate::edge::router::Route;
use crate::timing::{Observer, Phase, Spent};

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
        /// Connections that are open and still speak HTTP.
        connections: gauge { listener: LISTENERS };
        /// Connections that were accepted.
        connections_accepted: counter { listener: LISTENERS };
        /// Times that a connection was not accepted, usually for want of a file descriptor.
        accept_failures: counter { listener: LISTENERS };
        /// TLS handshakes that failed, or were not finished in time.
        tls_handshakes_failed: counter { listener: LISTENERS };
        /// Panics of tasks; each ended one connection or one conversation. Every one is a fault of the program.
        panics: counter;
    }
    "Executors and links" {
        /// Executor registrations by outcome.
        registrations: counter { outcome: Rule("`ok`, or the code of an error") };
        /// Connected executors.
        links: gauge { transport: TRANSPORTS };
        /// Executor sockets that were taken into use.
        links_opened: counter { transport: TRANSPORTS };
        /// Executor sockets by how they ended.
        links_ended: counter { outcome: Words(LINK_ENDS) };
        /// Messages of executors, pings and the like included.
        link_received_frames: counter;
        /// Messages sent to executors.
        link_sent_frames: counter;
        /// Bytes of messages of executors.
        link_received: counter bytes;
        /// Bytes of messages to executors.
        link_sent: counter bytes;
        /// Frames that wait to be sent to executors, of all links.
        link_outbox_frames: gauge;
        /// The same of the link with the most.
        link_outbox_frames_max: gauge;
        /// Frames dropped as undecodable or misplaced.
        frames_dropped: counter;
        /// Open streams by what they carry: calls of the gateway's own clients, a process session each, or what a plain
        /// or an encrypted harness says.
        streams: gauge { kind: STREAM_KINDS };
        /// Streams that were opened.
        streams_opened: counter { kind: STREAM_KINDS };
        /// Streams by why they ended: closed here, reset by the executor or for a reader that was too slow, the loss of
        /// their link, or that of the right to it.
        streams_ended: counter { reason: Words(&["closed", "reset", "overrun", "disconnected", "withdrawn"]) };
        /// Frames of executors that wait for their readers, of all streams.
        stream_inbox_frames: gauge;
        /// The same of the stream with the most.
        stream_inbox_frames_max: gauge;
        /// Encrypted handshakes that failed: of the gateway's own clients, or of harnesses.
        handshakes_failed: counter { by: Words(&["client", "harness"]) };
        /// Streams reset because their reader was too slow.
        streams_overrun: counter;
        /// Open sockets of harnesses.
        harnesses: gauge { kind: Words(&["plain", "encrypted"]) };
        /// Harness sockets by how they ended.
        harnesses_ended: counter { outcome: Words(HARNESS_ENDS) };
        /// Harnesses that came back to their own stream on another socket.
        harness_comebacks: counter;
        /// What waits for harnesses that were so slow that some of it went to disk, as their bounds count it.
        spill_held: gauge bytes { place: Words(&["memory", "disk"]) };
        /// Bytes for slow harnesses written to disk.
        spilled: counter bytes;
        /// Frames refused because a harness was too far behind.
        spill_overruns: counter;
        /// Frames for which a harness that was too far behind was waited for, and its link read more slowly.
        spill_waits: counter;
    }
    "Process sessions" {
        /// Process sessions, ended ones that can still be read included.
        sessions: gauge { state: Words(SESSION_STATES) };
        /// Process sessions that were begun.
        sessions_started: counter;
        /// Process sessions by the state in which they ended.
        sessions_ended: counter { state: Words(&["exited", "failed", "lost", "unknown"]) };
        /// Output of process sessions that was journalled.
        session_output: counter bytes;
        /// What the journals of process sessions take.
        session_journal: gauge bytes { place: Words(&["memory", "disk"]) };
        /// Output that can be read no more: for want of room within the bound of the session itself, or because it gave
        /// way to others on the disk.
        session_lost: counter bytes { quota: Words(&["session", "shared"]) };
        /// Process sessions that were over and forgotten early, to make room on the disk.
        sessions_given_way: counter;
        /// Callers that follow a session live.
        session_followers: gauge { door: Words(&["events", "attach"]) };
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
        /// Proxy tokens in memory.
        token_entries: gauge { verdict: VERDICTS };
        /// Proxy tokens that left memory for want of room.
        token_evictions: counter { verdict: VERDICTS };
        /// Rights that operators and services have taken away.
        revocations: counter { right: Words(&["token", "turn", "workspace", "binding", "executor"]) };
        /// Questions to the validator upstream.
        upstream_requests: counter;
        /// Questions that the validator upstream did not answer.
        upstream_failures: counter;
        /// How long questions to the validator upstream took.
        upstream_duration: histogram seconds { outcome: Words(&["answered", "failed"]) };
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
        /// Transfers whose sides met, by how they ended.
        transfers_ended: counter { outcome: Words(&["ok", "broken_off"]) };
        /// Bytes that transfers carried.
        transferred: counter bytes;
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
        /// Beginnings and ends that wait to be written.
        audit_waiting: gauge;
        /// Whether the audit log took no record when last tried.
        audit_failing: gauge;
    }
    "Store" {
        /// Questions that wait for the store's thread.
        store_waiting: gauge;
        /// Questions that were answered.
        store_questions: counter;
        /// Questions that were not: the database is locked, its disk fails, or the queue did not move.
        store_failures: counter;
        /// Time that questions waited for their turn.
        store_wait: counter seconds;
        /// Time that the store worked at questions.
        store_work: counter seconds;
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
        /// Whether the gateway stops: it takes no new work.
        draining: gauge;
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

const LISTENERS: Values = Words(&["api", "ops"]);
const STREAM_KINDS: Values = Words(&["call", "session", "plain_harness", "encrypted_harness"]);
const VERDICTS: Values = Words(&["good", "refused"]);

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

    /// Counts a message of an executor.
    pub fn received(&self, bytes: usize) {
        self.link_received_frames.inc();
        self.link_received.add(bytes as u64);
    }

    /// Counts a message to an executor.
    pub fn sent(&self, bytes: usize) {
        self.link_sent_frames.inc();
        self.link_sent.add(bytes as u64);
    }

    /// Reads what the system knows of this process.
    pub fn read_process(&self) {
        process::read(self);
    }
}

impl Observer for Metrics {
    fn ended(&self, door: &'static str, spent: Spent) {
        for (phase, time) in spent {
            self.request_phase_duration.observe([door, phase.name()], time);
        }
        self.request_duration.observe([door], spent.iter().map(|(_, time)| *time).sum());
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
