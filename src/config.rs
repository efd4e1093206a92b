//! Every knob of the gateway with its default and unit. The only reader of the environment.
//!
//! One table below makes the types, the defaults, the names and the documentation of all knobs. A knob has one name:
//! `auth.upstream_url` is `--auth-upstream-url`, `EXEC_GATEWAY_AUTH_UPSTREAM_URL` and `upstream_url` below `[auth]`.

use std::net::SocketAddr;
use std::path::PathBuf;

macro_rules! config {
    (
        top { $( $(#[doc = $tdoc:literal])* $tfield:ident : $tty:ty = $tdefault:expr ),* $(,)? }
        $( $(#[doc = $sdoc:literal])* $section:ident : $Section:ident {
            $( $(#[doc = $doc:literal])* $field:ident : $ty:ty = $default:expr ),* $(,)?
        } )*
    ) => {
        /// The effective configuration of one gateway.
        #[derive(Debug, Clone)]
        pub struct Config {
            $( $(#[doc = $tdoc])* pub $tfield: $tty, )*
            $( $(#[doc = $sdoc])* pub $section: $Section, )*
        }

        impl Default for Config {
            fn default() -> Self {
                Self { $( $tfield: $tdefault, )* $( $section: $Section::default(), )* }
            }
        }

        $(
            $(#[doc = $sdoc])*
            #[derive(Debug, Clone)]
            pub struct $Section { $( $(#[doc = $doc])* pub $field: $ty, )* }

            impl Default for $Section {
                fn default() -> Self {
                    Self { $( $field: $default, )* }
                }
            }
        )*
    };
}

config! {
    top {
        /// Addresses of the API, comma-separated.
        listen: Vec<SocketAddr> = vec![SocketAddr::from(([127, 0, 0, 1], 6060))],
        /// Address of `/metrics`, `/healthz` and `/readyz` for operators.
        ops_listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 6061)),
        /// Directory of everything that outlives the process. Empty: `$STATE_DIRECTORY`, else `$XDG_STATE_HOME/exec-gateway`, else `~/.local/state/exec-gateway`.
        state_dir: Option<PathBuf> = None,
        /// Base URL under which executors reach this gateway. Empty: the Host each of them called.
        public_url: Option<String> = None,
        /// Least severe log lines written: error, warn, info, debug or trace.
        log_level: LogLevel = LogLevel::Info,
        /// Form of log lines: text or json.
        log_format: LogFormat = LogFormat::Text,
    }

    /// HTTP connections and requests.
    edge: Edge {
        /// Open connections of all listeners together; further ones wait to be accepted.
        connections_max: usize = 20_000,
        /// Time for a client to send a request's headers, in seconds.
        header_timeout_secs: u64 = 10,
        /// Time for a client to send a request's body, in seconds.
        body_timeout_secs: u64 = 120,
        /// Size of a request's headers together, in bytes; at least 8192.
        header_bytes_max: usize = 64 * 1024,
        /// Size of a tool call's body, in bytes.
        body_bytes_max: usize = 64 * 1024 * 1024,
    }

    /// Who may call and connect.
    auth: Auth {
        /// Base URL of a service that validates proxy tokens and executor credentials. Empty: the gateway's own tokens only.
        upstream_url: Option<String> = None,
        /// Shared secret sent to that service as `X-Internal-Secret`.
        upstream_secret: Option<Secret> = None,
        /// Time for that service to answer, in seconds.
        upstream_timeout_secs: u64 = 5,
        /// How long a good token is believed without asking again, in seconds.
        positive_ttl_secs: u64 = 300,
        /// How long a refused token is refused without asking again, in seconds.
        negative_ttl_secs: u64 = 30,
        /// How long a token once good is believed while the service fails, in seconds since it was last confirmed.
        stale_secs: u64 = 600,
        /// Good tokens remembered.
        positive_entries_max: usize = 65_536,
        /// Refused tokens remembered.
        negative_entries_max: usize = 16_384,
        /// Questions to that service under way at once; further ones wait.
        upstream_requests_max: usize = 64,
        /// Life of the cap-tokens that the gateway mints for itself, in seconds.
        cap_token_ttl_secs: u64 = 86_400,
        /// Life of an executor's ticket, in seconds.
        ticket_ttl_secs: u64 = 86_400,
        /// Life of the authorization of one handshake, in seconds.
        harness_ttl_secs: u64 = 60,
        /// Revocations kept; a further one is refused.
        revocations_max: usize = 100_000,
    }

    /// Executors and their sockets.
    link: Link {
        /// Interval of pings to an executor, in seconds.
        ping_secs: u64 = 20,
        /// Silence after which an executor is taken for dead, in seconds.
        dead_secs: u64 = 60,
        /// Time for one write to an executor, in seconds.
        write_timeout_secs: u64 = 10,
        /// Time for the encrypted handshake of a stream, in seconds.
        handshake_timeout_secs: u64 = 10,
        /// Time for an executor to answer one request, in seconds.
        answer_timeout_secs: u64 = 30,
        /// Time for a connected executor to answer a ping when another process wants its place, in seconds.
        takeover_ping_secs: u64 = 3,
        /// How long a register or validate is held and retried inside before it is answered, in seconds; executors wait 10.
        register_hold_secs: u64 = 8,
        /// How long a call waits for an executor that was seen lately, in seconds.
        executor_wait_secs: u64 = 20,
        /// How lately that is, in seconds.
        executor_seen_secs: u64 = 60,
        /// Streams on one executor's socket; executors serve 128.
        streams_max: usize = 120,
        /// Streams of one workspace on one executor's socket.
        workspace_streams_max: usize = 80,
        /// Handshakes under way on one executor's socket; executors hold 32.
        handshakes_pending_max: usize = 16,
        /// Requests under way on one stream; further ones wait. Executors deadlock at about 500.
        requests_in_flight_max: usize = 64,
        /// Frames waiting to be written to one executor; senders wait their turn.
        outbox_frames_max: usize = 64,
        /// Bytes waiting for the reader of one stream; past it the stream is reset.
        stream_bytes_max: usize = 16 * 1024 * 1024,
        /// Size of one frame to or from an encrypted executor, in bytes; executors take 262144.
        frame_bytes_max: usize = 256 * 1024,
        /// Size of one JSON-RPC message, in bytes; executors take 67108864.
        message_bytes_max: usize = 64 * 1024 * 1024,
        /// Read buffer of one executor's socket, in bytes.
        read_buffer_bytes: usize = 4096,
        /// Registrations remembered for one executor; the oldest are forgotten.
        registrations_max: usize = 8,
    }

    /// Tenants.
    workspace: Workspaces {
        /// Tool calls at once of one workspace; further ones get 429.
        calls_max: usize = 256,
        /// Time after which an unused workspace is dropped from memory, in seconds.
        idle_secs: u64 = 900,
        /// Workspaces held in memory; past it the least lately used idle one is dropped.
        entries_max: usize = 10_000,
        /// How long a workspace's environment names are believed without reading the store again, in seconds.
        resolver_ttl_secs: u64 = 10,
    }

    /// Tool calls.
    tools: Tools {
        /// Time for a call that names none, in seconds.
        timeout_secs: u64 = 60,
        /// Longest time a call may ask for, in seconds.
        timeout_max_secs: u64 = 3600,
        /// Bytes of output, or of a file, that one call returns.
        output_bytes_max: usize = 32 * 1024 * 1024,
        /// Time after which a call still running sends its status and then spaces, in seconds; the Python client gives up after 30 s of silence.
        keepalive_after_secs: u64 = 15,
        /// Interval of those spaces, in seconds.
        keepalive_secs: u64 = 10,
        /// Variables of the executor's environment kept from commands, with `*` at the end for a prefix.
        env_exclude: Vec<String> = ["CODEX_*", "OPENAI_*", "AWS_*", "EXEC_*"].map(String::from).to_vec(),
    }

    /// Shutdown.
    drain: Drain {
        /// Time between not being ready and refusing new calls, in seconds.
        announce_secs: u64 = 0,
        /// Time for running calls to end, in seconds.
        grace_secs: u64 = 30,
    }
}

/// Least severe level of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// Something failed and nobody else will say so.
    Error,
    /// Something is off; the gateway goes on.
    Warn,
    /// What an operator follows.
    Info,
    /// What a developer follows.
    Debug,
    /// Everything.
    Trace,
}

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One readable line.
    Text,
    /// One JSON object a line.
    Json,
}

/// A configured secret: never shown, wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(zeroize::Zeroizing<String>);

impl Secret {
    /// Takes the text as a secret.
    pub fn new(text: String) -> Self {
        Self(zeroize::Zeroizing::new(text))
    }
    /// The secret itself, for the one place that sends it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}
