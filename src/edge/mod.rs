//! HTTP at the socket: accepting, limits, routes, WebSocket upgrades. It knows no rule of the domain.

pub mod body;
pub mod burst;
pub mod listener;
pub mod peer;
pub mod router;
pub mod stall;
pub mod tls;
pub mod transport;
pub mod upgrade;
