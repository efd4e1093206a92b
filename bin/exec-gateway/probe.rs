//! The `probe` command: asks the gateway of this configuration whether it takes new work, as balancers do. For health
//! checks of containers, where there is no other program to ask with.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, bail};
use exec_gateway::config::Config;

/// Longer than the gateway takes to try its store.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks `/readyz` once.
///
/// # Errors
/// Nobody answers, the gateway takes no new work, or its operators' listener is encrypted; the error says which.
pub fn run(config: &Config) -> anyhow::Result<()> {
    if config.tls.ops_certificate.is_some() {
        bail!("the operators' listener wants TLS, which this command does not speak");
    }
    let address = reachable(config.ops_listen);
    let answer = ask(address).with_context(|| format!("no gateway answers at {address}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.split(' ').nth(1) != Some("200") {
        bail!("not ready: {}", body.trim());
    }
    Ok(())
}

/// An address that stands for all of the machine's is asked at its own.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

fn ask(address: SocketAddr) -> std::io::Result<String> {
    let mut socket = TcpStream::connect_timeout(&address, PATIENCE)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.write_all(format!("GET /readyz HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    Ok(answer)
}
