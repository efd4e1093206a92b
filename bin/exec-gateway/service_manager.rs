//! What systemd is told about the daemon (sd_notify(3)), and the listening socket it may keep for it. Without a service
//! manager all of this is nothing.

use std::io;
use std::net::TcpListener;
use std::time::Duration;

use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

/// The listening socket of a service manager that keeps it open over restarts (sd_listen_fds(3)): the first it gives.
pub fn held_socket() -> io::Result<Option<TcpListener>> {
    ListenFd::from_env().take_tcp_listener(0)
}

/// Says that the daemon serves, and from now on that it is alive, as often as the service manager wants to hear it. A
/// runtime that no longer turns goes silent, and is then restarted.
pub fn serving() {
    tell(&[NotifyState::Ready, NotifyState::Status("serving")]);
    if let Some(patience) = sd_notify::watchdog_enabled() {
        tokio::spawn(stay_alive(patience));
    }
}

/// Says that the daemon reads its configuration anew.
pub fn reloading() {
    tell(&[NotifyState::Reloading, NotifyState::monotonic_usec_now().unwrap_or(NotifyState::MonotonicUsec(0))]);
}

/// Says that it has done so, with whatever result.
pub fn reloaded() {
    tell(&[NotifyState::Ready]);
}

/// Says that the daemon drains: from here on its end is meant.
pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("draining")]);
}

async fn stay_alive(patience: Duration) {
    let mut ticks = interval(patience / 3);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}

fn tell(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager was not told");
    }
}
