//! Every knob of the gateway with its default and unit. The only reader of the environment.
//!
//! One table below makes the types, the defaults, the ranges, the names and the documentation of all knobs. A knob has
//! one name: `auth.upstream_url` is `--auth-upstream-url`, `EXEC_GATEWAY_AUTH_UPSTREAM_URL` and `upstream_url` below
//! `[auth]`.

mod knob;
mod live;
mod resolve;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use ipnet::IpNet;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

pub use knob::{Kind, Knob};
pub use live::Live;
pub use resolve::{ConfigFaults, Fault, Resolved, Source};

use knob::Setting;

macro_rules! knob {
    (
        $config:ident . $($path:ident).+ : $ty:ty, $name:expr, [$($doc:literal)*], [$($range:expr)?], [$($fixed:ident)?]
    ) => {
        Knob {
            name: $name,
            doc: concat!($($doc, "\n"),*),
            kind: <$ty as Setting>::KIND,
            range: { let ranges: &[_] = &[$($range)?]; ranges.first() },
            set: |$config, items| { $config.$($path).+ = Setting::parse(items)?; Ok(()) },
            get: |$config| $config.$($path).+.show(),
            at_start: { let marks: &[&str] = &[$(stringify!($fixed))?]; !marks.is_empty() },
            same: |one, other| one.$($path).+ == other.$($path).+,
            copy: |$config, from| $config.$($path).+.clone_from(&from.$($path).+),
        }
    };
}

macro_rules! config {
    (
        top {
            $( $(#[doc = $tdoc:literal])* $tfield:ident : $tty:ty = $tdefault:expr $(; $tfixed:ident)? ),* $(,)?
        }
        $( $(#[doc = $sdoc:literal])* $section:ident : $Section:ident {
            $(
                $(#[doc = $doc:literal])*
                $field:ident : $ty:ty = $default:expr $(=> $range:expr)? $(; $fixed:ident)?
            ),* $(,)?
        } )*
    ) => {
        /// The effective configuration of one gateway.
        #[derive(Debug, Clone, PartialEq)]
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
            #[derive(Debug, Clone, PartialEq)]
            pub struct $Section { $( $(#[doc = $doc])* pub $field: $ty, )* }

            impl Default for $Section {
                fn default() -> Self {
                    Self { $( $field: $default, )* }
                }
            }
        )*

        /// Every knob: those without a section first, then section by section.
        pub static KNOBS: &[Knob] = &[
            $( knob!(config.$tfield: $tty, stringify!($tfield), [$($tdoc)*], [], [$($tfixed)?]), )*
            $( $( knob!(
                config.$section.$field: $ty,
                concat!(stringify!($section), ".", stringify!($field)), [$($doc)*], [$($range)?], [$($fixed)?]
            ), )* )*
        ];

        /// The configuration of a running gateway: whole, and by section for the parts that hold theirs.
        pub struct Running {
            whole: Live<Config>,
            before: Live<Option<Arc<Config>>>,
            /// How reloads went.
            pub reloads: Reloads,
            $( $(#[doc = $sdoc])* pub $section: Live<$Section>, )*
        }

        impl Running {
            /// With what the gateway starts.
            pub fn new(config: Config) -> Self {
                Self {
                    $( $section: config.$section.clone().into(), )*
                    before: None.into(),
                    reloads: Reloads::default(),
                    whole: config.into(),
                }
            }

            /// Takes over another configuration, for whatever begins from now on.
            pub fn set(&self, config: Config) {
                self.before.set(Some(self.now()));
                $( self.$section.set(config.$section.clone()); )*
                self.whole.set(config);
            }
        }

        /// The sections of the configuration file, each with its sentence.
        static SECTIONS: &[(&str, &str)] = &[ $( (stringify!($section), concat!($($sdoc),*)) ),* ];
    };
}

/// How many reloads there were since the start.
#[derive(Debug, Default)]
pub struct Reloads {
    /// Those that were carried out.
    pub done: AtomicU64,
    /// Those that were refused, since something was wrong with what was read.
    pub refused: AtomicU64,
}

impl Running {
    /// All knobs in effect at this moment.
    pub fn now(&self) -> Arc<Config> {
        self.whole.now()
    }

    /// Those before the last reload. Secrets that callers show are good until the reload after the one that replaced
    /// them, so that callers can be given the new one in between.
    pub fn before(&self) -> Option<Arc<Config>> {
        (*self.before.now()).clone()
    }
}

// A knob with `; at_start` keeps its value until the gateway is started anew; all others follow a reload.
config! {
    top {
        /// Addresses of the API; comma-separated outside of files.
        listen: Vec<SocketAddr> = vec![SocketAddr::from(([127, 0, 0, 1], 6060))]; at_start,
        /// Address of `/metrics`, `/healthz` and `/readyz` for operators.
        ops_listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 6061)); at_start,
        /// Directory of everything that outlives the process. Empty: `$STATE_DIRECTORY`, else `$XDG_STATE_HOME/exec-gateway`, else `~/.local/state/exec-gateway`.
        state_dir: Option<PathBuf> = None; at_start,
        /// Base URL under which executors reach this gateway. Empty: the Host each of them called.
        public_url: Option<String> = None,
        /// Least severe log lines written: error, warn, info, debug or trace.
        log_level: LogLevel = LogLevel::Info,
        /// Form of log lines: text or json.
        log_format: LogFormat = LogFormat::Text; at_start,
        /// Base URL of an OpenTelemetry collector that is sent the spans of requests, as `http://127.0.0.1:4318`; in builds with the feature `otlp`. Empty: none are made.
        otlp_endpoint: Option<String> = None; at_start,
    }

    /// HTTP connections and requests.
    edge: Edge {
        /// Open HTTP connections of all listeners together; further ones wait to be accepted.
        connections_max: usize = 20_000 => 1..=1_000_000,
        /// Time for a client to send its first request's headers, in seconds.
        header_timeout_secs: u64 = 10 => 1..=600,
        /// Time a connection may stay open without a request, in seconds.
        idle_timeout_secs: u64 = 120 => 1..=86_400,
        /// Time for a client to send a request's body, in seconds.
        body_timeout_secs: u64 = 120 => 1..=86_400,
        /// Time after which a peer that takes no bytes, or answers no probe, is taken for gone, in seconds.
        tcp_user_timeout_secs: u64 = 30 => 1..=3600,
        /// How long a client may take not one byte of its answer before its connection is closed, in seconds.
        write_timeout_secs: u64 = 30 => 1..=86_400,
        /// Size of a request's headers together, in bytes; at least 8192.
        header_bytes_max: usize = 64 * 1024 => 8192..=1024 * 1024,
        /// Size of a tool call's body, in bytes.
        body_bytes_max: usize = 64 * 1024 * 1024 => 1..=1024 * 1024 * 1024,
        /// Addresses or networks (10.0.0.0/8) of proxies whose X-Forwarded-Proto and X-Forwarded-Host are believed.
        trusted_proxies: Vec<IpNet> = Vec::new(),
    }

    /// Encryption of the listeners. The files are read again at SIGHUP, for new connections.
    tls: TlsPaths {
        /// PEM file with the certificate of the API and those that it is signed by. Empty: the API is served in the open.
        certificate: Option<PathBuf> = None,
        /// PEM file with the private key of that certificate.
        key: Option<PathBuf> = None,
        /// PEM file with authorities: executors then have to show a certificate of one of them. Empty: they need none.
        executor_authorities: Option<PathBuf> = None,
        /// The same for the operators' listener. Empty: it is served in the open.
        ops_certificate: Option<PathBuf> = None,
        /// PEM file with the private key of that certificate.
        ops_key: Option<PathBuf> = None,
        /// PEM file with authorities: whoever connects to the operators' listener then has to show a certificate of one of them.
        ops_authorities: Option<PathBuf> = None,
    }

    /// Who may call and connect.
    auth: Auth {
        /// Base URL of a service that validates proxy tokens and executor credentials. Empty: the gateway's own tokens only.
        upstream_url: Option<String> = None,
        /// PEM file with the authorities that may have signed the service's certificate, for a URL with https. Empty: those of the system.
        upstream_authorities: Option<PathBuf> = None,
        /// Shared secret sent to that service as `X-Internal-Secret`. Better given by file or by systemd.
        upstream_secret: Option<Secret> = None,
        /// File that holds `auth.upstream_secret`. With neither given: `$CREDENTIALS_DIRECTORY/upstream_secret`, as systemd passes it.
        upstream_secret_file: Option<PathBuf> = None,
        /// Secret of services that revoke turns, shown as a bearer token. Empty: their door does not exist. Better given by file or by systemd.
        shared_secret: Option<Secret> = None,
        /// File that holds `auth.shared_secret`. With neither given: `$CREDENTIALS_DIRECTORY/shared_secret`.
        shared_secret_file: Option<PathBuf> = None,
        /// Secret of the service that registers and binds executors for people, shown as `X-Internal-Secret`. Empty: its doors do not exist. Better given by file or by systemd.
        internal_secret: Option<Secret> = None,
        /// File that holds `auth.internal_secret`. With neither given: `$CREDENTIALS_DIRECTORY/internal_secret`.
        internal_secret_file: Option<PathBuf> = None,
        /// Time for the service at `auth.upstream_url` to answer, in seconds.
        upstream_timeout_secs: u64 = 5 => 1..=60,
        /// How long a good token is believed without asking again, in seconds.
        positive_ttl_secs: u64 = 300 => 1..=86_400,
        /// How long a refused token is refused without asking again, in seconds.
        negative_ttl_secs: u64 = 30 => 1..=86_400,
        /// How long a token once good is believed while the service fails, in seconds since it was last confirmed.
        stale_secs: u64 = 600 => 1..=86_400,
        /// Good tokens remembered.
        positive_entries_max: usize = 65_536 => 1..=10_000_000,
        /// Refused tokens remembered.
        negative_entries_max: usize = 16_384 => 1..=10_000_000,
        /// Questions to that service under way at once; further ones wait.
        upstream_requests_max: usize = 64 => 1..=10_000,
        /// Life of the cap-tokens that the gateway mints for itself, in seconds.
        cap_token_ttl_secs: u64 = 86_400 => 60..=30 * 86_400,
        /// Life of an executor's ticket, in seconds.
        ticket_ttl_secs: u64 = 86_400 => 60..=30 * 86_400,
        /// Life of the authorization of one handshake, in seconds.
        harness_ttl_secs: u64 = 60 => 5..=3600,
        /// Revocations kept; a further one is refused.
        revocations_max: usize = 100_000 => 1..=10_000_000,
    }

    /// Executors and their sockets.
    link: Link {
        /// Connected executors; a further one gets 503 and comes again.
        links_max: usize = 20_000 => 1..=1_000_000,
        /// Interval of pings to an executor, in seconds.
        ping_secs: u64 = 20 => 1..=3600,
        /// Silence after which an executor is taken for dead, in seconds.
        dead_secs: u64 = 60 => 2..=86_400,
        /// Time for one write to an executor, in seconds.
        write_timeout_secs: u64 = 10 => 1..=600,
        /// Time for the encrypted handshake of a stream, in seconds.
        handshake_timeout_secs: u64 = 10 => 1..=600,
        /// Time for an executor to answer one request, in seconds.
        answer_timeout_secs: u64 = 30 => 1..=3600,
        /// Time for a connected executor to answer a ping when another process wants its place, in seconds.
        takeover_ping_secs: u64 = 3 => 1..=9,
        /// How long a register or validate is held and retried inside before it is answered, in seconds; executors wait 10.
        register_hold_secs: u64 = 8 => 1..=9,
        /// How long a call waits for an executor that was seen lately, in seconds.
        executor_wait_secs: u64 = 20 => 1..=600,
        /// How lately that is, in seconds.
        executor_seen_secs: u64 = 60 => 1..=86_400,
        /// How long a harness that opens its socket waits for an executor that was seen lately, in seconds.
        harness_wait_secs: u64 = 5 => 1..=600,
        /// Time for a harness to say with its first frames what kind it is, in seconds.
        first_frame_secs: u64 = 10 => 1..=600,
        /// Streams on one executor's socket; executors serve 128.
        streams_max: usize = 120 => 1..=128,
        /// Streams of one workspace on one executor's socket.
        workspace_streams_max: usize = 80 => 1..=128,
        /// Handshakes under way on one executor's socket; executors hold 32.
        handshakes_pending_max: usize = 16 => 1..=32,
        /// Requests under way on one stream, and on the whole socket of an executor without relay frames; further ones wait. Executors deadlock at about 500.
        requests_in_flight_max: usize = 64 => 1..=64,
        /// Frames waiting to be written to one executor; senders wait their turn.
        outbox_frames_max: usize = 64 => 1..=65_536,
        /// Bytes waiting for the reader of one stream; past it the stream is reset.
        stream_bytes_max: usize = 16 * 1024 * 1024 => 1..=1024 * 1024 * 1024,
        /// Bytes for one slow harness stream kept in memory; what follows goes to disk.
        spill_memory_bytes_max: usize = 1024 * 1024 => 64 * 1024..=256 * 1024 * 1024,
        /// Bytes for one slow harness stream kept on disk; past it the link is read more slowly while that holds up nobody else, then the stream is reset.
        spill_bytes_max: u64 = 64 * 1024 * 1024 => 0..=1024 * 1024 * 1024 * 1024,
        /// How long a stream waits for its harness whose socket broke, in seconds, but not past dead_secs; 0 ends it at once.
        comeback_wait_secs: u64 = 30 => 0..=600,
        /// Newest bytes written to one harness in relay frames that are kept for its way back.
        comeback_bytes_max: usize = 1024 * 1024 => 0..=256 * 1024 * 1024,
        /// Size of one frame to or from an encrypted executor, in bytes; executors take 262144.
        frame_bytes_max: usize = 256 * 1024 => 4096..=262_144,
        /// Size of one JSON-RPC message, in bytes; executors take 67108864.
        message_bytes_max: usize = 64 * 1024 * 1024 => 4096..=67_108_864,
        /// Size of one frame from an executor without relay frames, in bytes: such executors send a whole answer in one.
        json_frame_bytes_max: usize = 96 * 1024 * 1024 => 65_536..=1024 * 1024 * 1024,
        /// How long, after a restart of the gateway, processes on such an executor wait for their callers before they are ended, in seconds; executors keep a session for 80.
        adopt_secs: u64 = 80 => 1..=80,
        /// Sessions of callers on such an executor, those included that wait to be taken up again.
        sessions_max: usize = 512 => 1..=65_536,
        /// Read buffer of one executor's socket, in bytes.
        read_buffer_bytes: usize = 4096 => 512..=1024 * 1024,
        /// Registrations remembered for one executor; the oldest are forgotten.
        registrations_max: usize = 8 => 1..=1000,
    }

    /// Tenants.
    workspace: Workspaces {
        /// Tool calls at once of one workspace; further ones get 429.
        calls_max: usize = 256 => 1..=1_000_000,
        /// Requests of one workspace in a second, by whichever door; further ones get 429. 0: as many as it likes.
        calls_per_second_max: u64 = 10_000 => 0..=10_000_000,
        /// Requests beyond that which may come at once after a pause.
        calls_burst_max: u64 = 20_000 => 0..=10_000_000,
        /// Time after which an unused workspace is dropped from memory, in seconds.
        idle_secs: u64 = 900 => 1..=30 * 86_400,
        /// Workspaces held in memory; past it the least lately used idle one is dropped.
        entries_max: usize = 10_000 => 1..=10_000_000,
        /// How long a workspace's environment names are believed without reading the store again, in seconds.
        resolver_ttl_secs: u64 = 10 => 1..=3600,
    }

    /// Memory of the process.
    memory: Memory {
        /// Part of its memory past which new work is refused with 503, in percent; 0 never. What runs goes on.
        high_percent: u64 = 85 => 0..=100,
        /// Part below which new work is taken again, in percent; at most `high_percent`.
        low_percent: u64 = 75 => 0..=100,
        /// What the process may take, in bytes; 0: as much as its control group, its limits (RLIMIT_AS, RLIMIT_DATA) and the machine allow.
        limit_bytes: usize = 0 => 0..=1024 * 1024 * 1024 * 1024,
        /// Bytes of request bodies, and of answers that are not taken yet, in memory at once; requests that would need more get 503. Work on one takes up to four times its size.
        bodies_bytes_max: u64 = 512 * 1024 * 1024 => 1..=1024 * 1024 * 1024 * 1024,
    }

    /// Tool calls.
    tools: Tools {
        /// Time for a call that names none, in seconds.
        timeout_secs: u64 = 60 => 1..=86_400,
        /// Longest time a call may ask for, in seconds.
        timeout_max_secs: u64 = 3600 => 1..=86_400,
        /// Time that a call waits for its executor to come back after the loss of its link, in seconds.
        relink_wait_secs: u64 = 25 => 1..=3600,
        /// Bytes of output, or of a file, that one call returns.
        output_bytes_max: usize = 32 * 1024 * 1024 => 1..=64 * 1024 * 1024,
        /// Bytes of a file that one `PUT` of it may have.
        upload_bytes_max: u64 = 64 * 1024 * 1024 * 1024 => 1..=1024 * 1024 * 1024 * 1024,
        /// Bytes that the files of one patch may have together, in memory.
        patch_bytes_max: usize = 64 * 1024 * 1024 => 1..=1024 * 1024 * 1024,
        /// Time after which a call still running sends its status and then spaces, in seconds; the Python client gives up after 30 s of silence.
        keepalive_after_secs: u64 = 15 => 1..=29,
        /// Interval of those spaces, in seconds.
        keepalive_secs: u64 = 10 => 1..=29,
        /// Variables of the executor's environment kept from commands, with `*` at the end for a prefix.
        env_exclude: Vec<String> = ["CODEX_*", "OPENAI_*", "AWS_*", "EXEC_*"].map(String::from).to_vec(),
    }

    /// Transfers: byte pipes between two HTTP clients that hold the same ticket.
    transfer: Transfers {
        /// Time for the two sides of a transfer to meet where its maker names none, in seconds.
        ticket_ttl_secs: u64 = 300 => 1..=86_400,
        /// Longest such time that a maker may ask for, in seconds.
        ticket_ttl_max_secs: u64 = 3600 => 1..=86_400,
        /// Transfers of one workspace that are not over; a further one gets 429.
        workspace_max: usize = 16 => 1..=100_000,
        /// How long a sender may send nothing before its transfer, or its upload of a file, fails, in seconds.
        stall_secs: u64 = 30 => 1..=3600,
    }

    /// Process sessions.
    session: Sessions {
        /// Sessions of one workspace, ended ones that can still be read included; a further one gets 429.
        workspace_max: usize = 64 => 1..=100_000,
        /// Time after its end for which a session stays readable without being read, in seconds.
        idle_secs: u64 = 1800 => 1..=30 * 86_400,
        /// Time after which a running process is ended that neither writes nor is read or written to, in seconds.
        running_idle_secs: u64 = 86_400 => 1..=365 * 86_400,
        /// Newest output of one session kept in memory for quick reading, in bytes.
        memory_bytes_max: usize = 1024 * 1024 => 4096..=256 * 1024 * 1024,
        /// Output of one session kept on disk, in bytes; past it the oldest goes.
        spill_bytes_max: u64 = 256 * 1024 * 1024 => 1024 * 1024..=1024 * 1024 * 1024 * 1024,
        /// Output of all sessions of one workspace kept on disk, in bytes; past it the oldest finished sessions go, then the oldest output.
        workspace_spill_bytes_max: u64 = 4 * 1024 * 1024 * 1024 => 1024 * 1024..=1024 * 1024 * 1024 * 1024,
        /// Output of all sessions together kept on disk, in bytes.
        total_spill_bytes_max: u64 = 16 * 1024 * 1024 * 1024 => 1024 * 1024..=1024 * 1024 * 1024 * 1024,
        /// Part of the disk that output never takes, in percent.
        disk_free_percent: u64 = 10 => 0..=90,
        /// Output that one answer carries when the caller does not say, in bytes.
        page_bytes: usize = 1024 * 1024 => 1024..=64 * 1024 * 1024,
        /// Output that one answer carries at most, in bytes.
        page_bytes_max: usize = 8 * 1024 * 1024 => 1024..=64 * 1024 * 1024,
        /// Streams of one workspace that follow sessions live, as events or attached; a further one gets 429.
        streams_max: usize = 128 => 1..=100_000,
        /// Longest time a caller may wait for new output, or for stdin to be accepted, in seconds.
        wait_max_secs: u64 = 25 => 1..=28,
        /// How long an executor keeps the processes of a link that it lost, in seconds; codex keeps them 80 s.
        retention_secs: u64 = 80 => 1..=86_400,
    }

    /// The record of who did what.
    audit: Audit {
        /// Whether what callers, harnesses, executors and operators do is recorded: true or false.
        enabled: bool = true; at_start,
        /// What becomes of new calls while the disk takes no more records: refuse answers them with 503, go_on carries them out and records later how many records are missing.
        when_full: WhenFull = WhenFull::Refuse,
        /// Whether contents are recorded too: whole arguments with file contents, patches and values of variables, and what is written to stdin.
        contents: bool = false,
        /// Size of a command or path as it is recorded, in bytes; of a longer one the beginning, its size and its SHA-256.
        detail_bytes_max: usize = 4096 => 256..=65_536,
        /// The same for contents, in bytes.
        content_bytes_max: usize = 64 * 1024 => 256..=16 * 1024 * 1024,
        /// Size at which a new file is begun, in bytes; one is also begun every day.
        file_bytes_max: u64 = 16 * 1024 * 1024 => 65_536..=1024 * 1024 * 1024,
        /// Size of all files together, in bytes; past it the oldest go. At least twice `file_bytes_max`.
        bytes_max: u64 = 4 * 1024 * 1024 * 1024 => 131_072..=1024 * 1024 * 1024 * 1024,
        /// How long records are kept, in days; files go as a whole.
        retention_days: u64 = 90 => 1..=36_525,
        /// Records waiting to be written; further calls wait. As many ends of calls are held back while the disk takes no more.
        queue_max: usize = 1024 => 1..=1_000_000; at_start,
        /// What is under way and remembered, so that after a kill its end is recorded as unknown.
        open_max: usize = 65_536 => 1..=1_000_000,
    }

    /// MCP clients.
    mcp: Mcp {
        /// Text of one answer, in bytes: what is longer is cut in the middle, since models read it.
        text_bytes_max: usize = 64 * 1024 => 1024..=16 * 1024 * 1024,
        /// Interval in which a client that asks for it is told that its call goes on, in seconds; first after one.
        progress_secs: u64 = 5 => 1..=3600,
        /// Web origins whose pages may call, as `https://app.example.com`; those of this machine and of `public_url` always may.
        allowed_origins: Vec<String> = Vec::new(),
        /// Issuers of tokens that clients are told of, as URLs; for a service at `auth.upstream_url` that accepts their tokens.
        authorization_servers: Vec<String> = Vec::new(),
    }

    /// Shutdown.
    drain: Drain {
        /// Time between not being ready and refusing new calls, in seconds.
        announce_secs: u64 = 0 => 0..=50,
        /// Time for running calls to end, in seconds; together with `announce_secs` at most 50, since the process ends within 60.
        grace_secs: u64 = 30 => 1..=50,
    }
}

impl TlsPaths {
    /// The files of the API's TLS, if it has any.
    pub fn api(&self) -> Option<TlsFiles> {
        TlsFiles::of(&self.certificate, &self.key, &self.executor_authorities, false)
    }

    /// Those of the operators' listener.
    pub fn ops(&self) -> Option<TlsFiles> {
        TlsFiles::of(&self.ops_certificate, &self.ops_key, &self.ops_authorities, true)
    }
}

/// The files of one listener's TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM: the certificate, then those that it is signed by.
    pub certificate: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
    /// PEM: who may have signed the certificates of clients.
    pub authorities: Option<PathBuf>,
    /// Whether a client without a certificate is refused at once, rather than at the doors that ask for one.
    pub required: bool,
}

impl TlsFiles {
    fn of(
        certificate: &Option<PathBuf>,
        key: &Option<PathBuf>,
        authorities: &Option<PathBuf>,
        required: bool,
    ) -> Option<Self> {
        let (certificate, key) = (certificate.clone()?, key.clone()?);
        Some(Self { certificate, key, authorities: authorities.clone(), required })
    }
}

impl Config {
    /// All that is wrong with these values, in the order of the table; empty when a gateway can start with them.
    pub fn validate(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        let mut wrong = |knob: &str, message: &str| faults.push(Fault::new(knob, message));

        for knob in KNOBS {
            if let (Some(range), Some(number)) = (knob.range, knob.get(self).as_u64())
                && !range.contains(&number)
            {
                wrong(knob.name, &format!("{number} is not within {} to {}", range.start(), range.end()));
            }
        }

        if self.listen.is_empty() {
            wrong("listen", "the API needs at least one address");
        }
        for (nth, address) in self.listen.iter().enumerate() {
            if self.listen[..nth].iter().any(|earlier| collide(earlier, address)) {
                wrong("listen", &format!("{address} is taken by an earlier address of the list"));
            }
            if collide(address, &self.ops_listen) {
                wrong("ops_listen", &format!("{} is taken by the API's {address}", self.ops_listen));
            }
        }

        if let Some(url) = &self.public_url
            && let Err(message) = check_url(url, &["http", "https", "ws", "wss"])
        {
            wrong("public_url", &message);
        }
        if let Some(url) = &self.otlp_endpoint {
            if let Err(message) = check_url(url, &["http"]) {
                wrong("otlp_endpoint", &message);
            } else if !cfg!(feature = "otlp") {
                wrong("otlp_endpoint", "this build makes no spans: build with `--features otlp`");
            }
        }
        for (knob, urls) in [
            ("mcp.allowed_origins", &self.mcp.allowed_origins),
            ("mcp.authorization_servers", &self.mcp.authorization_servers),
        ] {
            if let Some(message) = urls.iter().find_map(|url| check_url(url, &["http", "https"]).err()) {
                wrong(knob, &message);
            }
        }
        if let Some(url) = &self.auth.upstream_url {
            if let Err(message) = check_url(url, &["http", "https"]) {
                wrong("auth.upstream_url", &message);
            }
            if self.auth.upstream_secret.is_none() {
                wrong("auth.upstream_secret", "is needed with auth.upstream_url; it or its file is not given");
            }
        }
        let auth = &self.auth;
        for (knob, secret) in [
            ("auth.upstream_secret", &auth.upstream_secret),
            ("auth.shared_secret", &auth.shared_secret),
            ("auth.internal_secret", &auth.internal_secret),
        ] {
            // An empty secret would open its doors to everybody.
            if secret.as_ref().is_some_and(|secret| secret.expose().is_empty() || !is_header_value(secret.expose())) {
                wrong(knob, "is empty or holds characters that an HTTP header cannot carry");
            }
        }

        if self.auth.shared_secret.as_ref().is_some_and(|secret| secret.expose().contains(' ')) {
            wrong("auth.shared_secret", "has a blank in it, which no bearer token has");
        }

        let tls = &self.tls;
        for (certificate, key, authorities, certificate_knob, key_knob, authorities_knob) in [
            (
                &tls.certificate,
                &tls.key,
                &tls.executor_authorities,
                "tls.certificate",
                "tls.key",
                "tls.executor_authorities",
            ),
            (
                &tls.ops_certificate,
                &tls.ops_key,
                &tls.ops_authorities,
                "tls.ops_certificate",
                "tls.ops_key",
                "tls.ops_authorities",
            ),
        ] {
            match (certificate, key) {
                (Some(_), None) => wrong(key_knob, &format!("is needed with {certificate_knob}")),
                (None, Some(_)) => wrong(certificate_knob, &format!("is needed with {key_knob}")),
                (None, None) if authorities.is_some() => {
                    wrong(authorities_knob, &format!("means nothing without {certificate_knob}"))
                }
                _ => {}
            }
        }

        if self.link.dead_secs <= self.link.ping_secs {
            wrong(
                "link.dead_secs",
                "must be above link.ping_secs, or every executor is taken for dead between two pings",
            );
        }
        if self.link.takeover_ping_secs >= self.link.register_hold_secs {
            wrong(
                "link.takeover_ping_secs",
                "must be below link.register_hold_secs, within which the ping is answered",
            );
        }
        if self.link.message_bytes_max < self.link.frame_bytes_max {
            wrong("link.message_bytes_max", "must be at least link.frame_bytes_max, since a message fills a frame");
        }
        if self.memory.low_percent > self.memory.high_percent && self.memory.high_percent > 0 {
            wrong("memory.low_percent", "must be at most memory.high_percent");
        }
        if self.memory.bodies_bytes_max < self.edge.body_bytes_max as u64 {
            wrong("memory.bodies_bytes_max", "must be at least edge.body_bytes_max, or a large body is never taken");
        }
        if self.tools.timeout_secs > self.tools.timeout_max_secs {
            wrong("tools.timeout_secs", "must be at most tools.timeout_max_secs");
        }
        for pattern in &self.tools.env_exclude {
            let name = pattern.strip_suffix('*').unwrap_or(pattern);
            if pattern.is_empty() || name.contains(['*', '=']) {
                wrong(
                    "tools.env_exclude",
                    &format!("`{pattern}` is not a variable's name, with `*` at the end at most"),
                );
            }
        }
        if self.transfer.ticket_ttl_secs > self.transfer.ticket_ttl_max_secs {
            wrong("transfer.ticket_ttl_secs", "must be at most transfer.ticket_ttl_max_secs");
        }
        if self.audit.bytes_max / 2 < self.audit.file_bytes_max {
            wrong("audit.bytes_max", "must be at least twice audit.file_bytes_max, since files go as a whole");
        }
        // Each is within its range already; saturating keeps absurd ones from wrapping round.
        if self.drain.announce_secs.saturating_add(self.drain.grace_secs) > 50 {
            wrong(
                "drain.grace_secs",
                "with drain.announce_secs must be at most 50: the process ends within 60 seconds",
            );
        }
        faults
    }

    /// The state directory: the configured one, else `$STATE_DIRECTORY` (its first entry), else
    /// `$XDG_STATE_HOME/exec-gateway`, else `~/.local/state/exec-gateway`. The directory may not exist yet.
    ///
    /// # Errors
    /// [`NoStateDir`] when none of them is known.
    pub fn state_dir(&self) -> Result<PathBuf, NoStateDir> {
        self.state_dir.clone().or_else(|| usual_state_dir(|name| std::env::var_os(name))).ok_or(NoStateDir)
    }

    /// The configuration file with every knob at its default and its sentences above it.
    pub fn sample() -> String {
        let mut text = String::from(
            "# Configuration of exec-gateway: every knob at its default.\n\
             #\n\
             # Flags win over the environment, which wins over this file. A knob has one name: upstream_url below [auth]\n\
             # is --auth-upstream-url and EXEC_GATEWAY_AUTH_UPSTREAM_URL. An empty text is the same as none.\n\
             # SIGHUP has a running gateway take over what changed, but for knobs that say that they need a restart.\n",
        );
        let (defaults, mut current) = (Self::default(), None);
        for knob in KNOBS {
            if knob.section() != current {
                current = knob.section();
                let (name, doc) = SECTIONS.iter().find(|(name, _)| Some(*name) == current).expect("the same table");
                text += &format!("\n\n{}[{name}]\n", comment(doc));
            }
            let restart = if knob.at_start { " Needs a restart to change." } else { "" };
            text += &format!("\n{}{} = {}\n", comment(&(knob.doc() + restart)), knob.key(), knob.toml(&defaults));
        }
        text
    }
}

impl Config {
    /// The page of all knobs, in Markdown.
    pub fn page() -> String {
        let mut text = String::from(
            "# Configuration\n\nEvery knob of the gateway. A value is taken from the flag, else from the \
             variable, else from the file given by `--config`\n(TOML, as in \
             [`exec-gateway.toml`](exec-gateway.toml)), else it is the default. `exec-gateway check` says what \
             is wrong with\nall of them at once, `exec-gateway config` where each value comes from. On SIGHUP \
             (`systemctl reload`) a running gateway\ntakes over what has changed, for whatever begins from \
             then on; knobs marked *restart* keep the value with which it\nstarted, and are named in the log. \
             This page is generated from the table in `src/config.rs`.\n",
        );
        let (defaults, mut current) = (Self::default(), None);
        for knob in KNOBS {
            if current != Some(knob.section()) {
                current = Some(knob.section());
                let section = SECTIONS.iter().find(|(name, _)| Some(*name) == knob.section());
                text += &match section {
                    Some((name, doc)) => format!("\n## `[{name}]`\n\n{}\n", doc.trim()),
                    None => "\n## Above all sections\n".into(),
                };
                text += "\n| knob | default | values | reload | what it says |\n|---|---|---|---|---|\n";
            }
            let flag = knob.flag().map_or("no flag".into(), |flag| format!("`--{flag}`"));
            let values = match knob.range {
                Some(range) => format!("{} to {}", range.start(), range.end()),
                None => format!("`{}`", knob.kind.placeholder().replace('|', "\\|")),
            };
            let reload = if knob.at_start { "*restart*" } else { "yes" };
            let (name, variable, default) = (knob.name, knob.variable(), knob.toml(&defaults));
            let doc = knob.doc().replace('|', "\\|");
            text += &format!("| `{name}`<br>{flag}<br>`{variable}` | `{default}` | {values} | {reload} | {doc} |\n");
        }
        text
    }
}

/// Nothing says where the state of the gateway lives.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no state directory is known: give --state-dir, or set STATE_DIRECTORY, XDG_STATE_HOME or HOME")]
pub struct NoStateDir;

fn usual_state_dir(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name| variable(name).filter(|value| !value.is_empty());
    if let Some(given) = set("STATE_DIRECTORY") {
        return std::env::split_paths(&given).next();
    }
    // The XDG specification has relative paths ignored.
    let xdg = set("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = xdg.or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".local/state")))?;
    Some(base.join("exec-gateway"))
}

/// Whether the second address cannot be bound while the first is. Port 0 is a different port each time.
fn collide(one: &SocketAddr, other: &SocketAddr) -> bool {
    one.port() != 0
        && one.port() == other.port()
        && one.is_ipv4() == other.is_ipv4()
        && (one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified())
}

fn scheme(url: &str) -> String {
    url.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase()).unwrap_or_default()
}

/// Messages never repeat the URL: somebody may have put a password into it.
fn check_url(url: &str, schemes: &[&str]) -> Result<(), String> {
    if !schemes.contains(&scheme(url).as_str()) {
        return Err(format!("must start with {}://", schemes.join(":// or ")));
    }
    let parsed: hyper::Uri = url.parse().map_err(|_| "is not a URL".to_string())?;
    if parsed.host().is_none_or(str::is_empty) {
        return Err("names no host".into());
    }
    if knob::has_user_info(url) {
        return Err(knob::USER_INFO.into());
    }
    // The parser drops a fragment silently, so the text itself is looked at.
    if url.contains(['?', '#']) {
        return Err("is a base to which paths are added; it cannot have `?` or `#`".into());
    }
    Ok(())
}

/// Visible ASCII with blanks only inside: what every HTTP implementation passes on unchanged.
fn is_header_value(text: &str) -> bool {
    text.trim() == text && text.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

/// The sentences as lines of comment of at most 118 columns.
fn comment(doc: &str) -> String {
    let mut lines = vec![String::from("#")];
    for word in doc.split_whitespace() {
        if lines.last().is_some_and(|line| line.len() + 1 + word.len() > 118) {
            lines.push(String::from("#"));
        }
        if let Some(line) = lines.last_mut() {
            line.push(' ');
            line.push_str(word);
        }
    }
    lines.join("\n") + "\n"
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

/// What becomes of calls that cannot be recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// They are refused.
    Refuse,
    /// They are carried out, and how many records are missing is recorded as soon as that is possible.
    GoOn,
}

/// A configured secret: never shown, wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(zeroize::Zeroizing<String>);

impl Secret {
    /// Takes the text as a secret.
    pub fn new(text: String) -> Self {
        Self(zeroize::Zeroizing::new(text))
    }
    /// Whether this is the secret that a caller showed. How long the answer takes says nothing about it.
    pub fn is(&self, shown: &str) -> bool {
        let digest = |text: &str| Sha256::digest(text.as_bytes());
        digest(&self.0).ct_eq(&digest(shown)).into()
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;

    fn places(change: impl FnOnce(&mut Config)) -> Vec<String> {
        let mut config = Config::default();
        change(&mut config);
        config.validate().into_iter().map(|fault| fault.place).collect()
    }

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(Config::default().validate(), []);
    }

    #[test]
    fn every_number_has_a_range_and_is_held_to_it() {
        for knob in KNOBS.iter().filter(|knob| knob.kind == Kind::Number) {
            let range = knob.range.unwrap_or_else(|| panic!("{} has no range", knob.name));
            let mut config = Config::default();
            knob.set(&mut config, &[(range.end() + 1).to_string()]).unwrap();
            assert!(config.validate().iter().any(|fault| fault.place == knob.name), "{}", knob.name);
        }
    }

    #[test]
    fn values_that_contradict_each_other_are_named() {
        assert_eq!(places(|config| config.link.dead_secs = 20), ["link.dead_secs"]);
        assert_eq!(places(|config| config.link.takeover_ping_secs = 8), ["link.takeover_ping_secs"]);
        assert_eq!(places(|config| config.link.message_bytes_max = 8192), ["link.message_bytes_max"]);
        assert_eq!(places(|config| config.memory.low_percent = 86), ["memory.low_percent"]);
        assert_eq!(places(|config| config.memory.bodies_bytes_max = 4096), ["memory.bodies_bytes_max"]);
        assert_eq!(places(|config| config.tools.timeout_secs = 3601), ["tools.timeout_secs"]);
        assert_eq!(places(|config| config.drain.announce_secs = 26), ["drain.grace_secs"]);
        assert_eq!(places(|config| config.audit.bytes_max = 20 * 1024 * 1024), ["audit.bytes_max"]);
        assert_eq!(places(|config| config.tools.env_exclude = vec!["A*B".into()]), ["tools.env_exclude"]);
    }

    #[test]
    fn addresses_are_distinct_unless_the_port_is_chosen_by_the_system() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(places(|config| config.listen.clear()), ["listen"]);
        assert_eq!(places(|config| config.ops_listen = config.listen[0]), ["ops_listen"]);
        assert_eq!(places(|config| config.ops_listen = address("0.0.0.0:6060")), ["ops_listen"]);
        assert_eq!(places(|config| config.listen.push(config.listen[0])), ["listen"]);
        let any_port = places(|config| {
            config.listen = vec![address("127.0.0.1:0"), address("127.0.0.1:0")];
            config.ops_listen = address("127.0.0.1:0");
        });
        assert!(any_port.is_empty(), "{any_port:?}");
    }

    #[test]
    fn urls_need_a_known_scheme_and_a_host() {
        for good in ["http://gateway.test", "https://gateway.test/base", "ws://[::1]:80", "WSS://gateway.test/"] {
            assert_eq!(places(|config| config.public_url = Some(good.into())), Vec::<String>::new(), "{good}");
        }
        for bad in ["gateway.test", "ftp://gateway.test", "http://", "http://a b", "http://u@host", "http://host?q"] {
            assert_eq!(places(|config| config.public_url = Some(bad.into())), ["public_url"], "{bad}");
        }
    }

    #[test]
    fn a_collector_of_spans_needs_a_plain_address_and_a_build_that_makes_spans() {
        let collector = |url: &str| places(|config| config.otlp_endpoint = Some(url.into()));
        assert_eq!(collector("https://127.0.0.1:4318"), ["otlp_endpoint"]);
        assert_eq!(collector("http://127.0.0.1:4318").is_empty(), cfg!(feature = "otlp"));
    }

    #[test]
    fn the_upstream_needs_a_web_address_and_a_secret_that_fits_a_header() {
        let upstream = |url: &str, secret: Option<&str>| {
            places(|config| {
                config.auth.upstream_url = Some(url.into());
                config.auth.upstream_secret = secret.map(|text| Secret::new(text.into()));
            })
        };
        assert_eq!(upstream("http://upstream.test", Some("s3cret")), Vec::<String>::new());
        assert_eq!(upstream("https://upstream.test", Some("s3cret")), Vec::<String>::new());
        assert_eq!(upstream("ftp://upstream.test", Some("s3cret")), ["auth.upstream_url"]);
        assert_eq!(upstream("http://upstream.test", None), ["auth.upstream_secret"]);
        assert_eq!(upstream("http://upstream.test", Some("line\nbreak")), ["auth.upstream_secret"]);
    }

    #[test]
    fn a_secret_that_nobody_could_show_is_refused() {
        let services = |shared: &str, internal: &str| {
            places(|config| {
                config.auth.shared_secret = Some(Secret::new(shared.into()));
                config.auth.internal_secret = Some(Secret::new(internal.into()));
            })
        };
        assert_eq!(services("s3cret", "with blanks inside"), Vec::<String>::new());
        assert_eq!(services("", ""), ["auth.shared_secret", "auth.internal_secret"]);
        assert_eq!(services("with a blank", " s3cret"), ["auth.internal_secret", "auth.shared_secret"]);
    }

    /// `REWRITE=1 cargo test` brings the page up to date after a change of the table.
    #[test]
    fn the_page_in_deploy_tells_every_knob() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/CONFIGURATION.md");
        if std::env::var_os("REWRITE").is_some() {
            std::fs::write(&path, Config::page()).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(text == Config::page(), "deploy/CONFIGURATION.md is out of date: run this test with REWRITE=1");
    }

    /// `REWRITE=1 cargo test` brings the file up to date after a change of the table.
    #[test]
    fn the_file_in_deploy_lists_every_knob_at_its_default() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/exec-gateway.toml");
        if std::env::var_os("REWRITE").is_some() {
            std::fs::write(&path, Config::sample()).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text == Config::sample(), "deploy/exec-gateway.toml is out of date: run this test with REWRITE=1");

        let resolved = Config::resolve(&[], Some((&path, &text)), std::iter::empty()).unwrap();
        assert_eq!(resolved.config, Config::default());
        for (knob, source) in resolved.sources {
            assert_eq!(source, Source::File, "{knob} is not in the file");
        }
    }
}
