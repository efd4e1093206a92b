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

#[test]
fn every_test_that_the_threat_model_names_is_there() {
    let repository = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let model = std::fs::read_to_string(repository.join("deploy/THREATS.md")).unwrap();
    // Names of tests are long; `module::Type` is not one.
    let named: Vec<_> = model
        .split('`')
        .filter_map(|word| word.split_once("::"))
        .filter(|(_, name)| name.len() > 20 && name.chars().all(|char| char.is_ascii_lowercase() || char == '_'))
        .collect();
    assert!(named.len() > 50, "{named:?}");
    for (file, name) in named {
        let places = [format!("tests/{file}.rs"), format!("src/{file}.rs"), format!("src/{file}_tests.rs")];
        let sources = places.iter().filter_map(|place| std::fs::read_to_string(repository.join(place)).ok());
        assert!(sources.into_iter().any(|source| source.contains(&format!("fn {name}("))), "{file}::{name}");
    }
}
