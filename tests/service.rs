//! The daemon under a service manager.

use std::time::Duration;

use tokio::net::UnixDatagram;

use crate::support::{DaemonProcess, Scratch};

#[tokio::test]
async fn the_service_manager_is_told_of_the_start_the_life_and_the_end() {
    let state = Scratch::new();
    let path = state.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    let told = async || {
        let mut text = [0; 512];
        let len = manager.recv(&mut text).await.unwrap();
        String::from_utf8(text[..len].to_vec()).unwrap()
    };

    let daemon = DaemonProcess::start_watched(&state, &path, Duration::from_millis(30)).await;

    assert_eq!(told().await, "READY=1\nSTATUS=serving\n");
    for _ in 0..3 {
        assert_eq!(told().await, "WATCHDOG=1\n");
    }
    let told_next = async || loop {
        let text = told().await;
        if text != "WATCHDOG=1\n" {
            break text;
        }
    };
    daemon.hang_up().await;
    let begun = told_next().await;
    assert!(begun.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{begun}");
    assert_eq!(told_next().await, "READY=1\n");
    let ended = tokio::spawn(daemon.terminate());
    let farewell = told_next().await;
    assert_eq!(farewell, "STOPPING=1\nSTATUS=draining\n");
    assert_eq!(ended.await.unwrap(), Some(0));
}
