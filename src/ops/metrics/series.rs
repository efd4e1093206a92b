//! Series: the numbers behind a row of the table, as atomics that any thread may change, and how each is printed.
//! Owned by [`Metrics`](super::Metrics). A lock is taken only to find the number behind labels.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use prometheus_client::encoding::{MetricEncoder, NoLabelSet};

use super::{Kind, Metric, Unit};

/// Upper bounds of the buckets of every histogram, in microseconds: few, since each costs a series for each value of
/// its labels. Below a millisecond is the gateway's own work, above 25 s is what waits for an executor.
const BUCKETS: [u64; 8] = [1_000, 5_000, 25_000, 100_000, 500_000, 2_500_000, 25_000_000, 300_000_000];

/// Rows with at most so many series print all of them from the start, at zero: a series that first appears with its
/// first event hides that event from `increase()`.
const PRESET_MAX: usize = 64;

/// One number: a counter's, or a gauge's level. Seconds are kept as microseconds.
#[derive(Debug, Default)]
pub struct Number(AtomicU64);

impl Number {
    /// One more.
    pub fn inc(&self) {
        self.add(1);
    }

    /// So many more.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    /// So many less; for levels.
    pub fn sub(&self, count: u64) {
        self.0.fetch_sub(count, Relaxed);
    }

    /// As somebody else counts it.
    pub fn set(&self, count: u64) {
        self.0.store(count, Relaxed);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A level that is one higher until this is dropped.
#[derive(Debug)]
pub struct Held(Arc<Number>);

impl Held {
    /// Raises the level.
    pub fn one(level: Arc<Number>) -> Self {
        level.inc();
        Self(level)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.sub(1);
    }
}

/// How long things took.
#[derive(Debug, Default)]
pub struct Times {
    /// By the first bound that is not exceeded; the last is that of no bound.
    buckets: [AtomicU64; BUCKETS.len() + 1],
    micros: AtomicU64,
}

impl Times {
    /// One thing took so long.
    pub fn observe(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.buckets[BUCKETS.partition_point(|bound| *bound < micros)].fetch_add(1, Relaxed);
        self.micros.fetch_add(micros, Relaxed);
    }
}

/// One thing for each set of values of `N` labels.
#[derive(Debug)]
pub struct By<T, const N: usize>(RwLock<BTreeMap<[&'static str; N], Arc<T>>>);

impl<T, const N: usize> Default for By<T, N> {
    fn default() -> Self {
        Self(RwLock::default())
    }
}

impl<T: Default, const N: usize> By<T, N> {
    /// What is behind these values, in the order of the row. Takes a lock: whoever counts frames keeps it.
    pub fn of(&self, values: [&'static str; N]) -> Arc<T> {
        if let Some(known) = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&values) {
            return known.clone();
        }
        self.0.write().unwrap_or_else(PoisonError::into_inner).entry(values).or_default().clone()
    }
}

impl<const N: usize> By<Number, N> {
    /// Sets all levels as counted: each is the sum of what is given for its values, and 0 where nothing is.
    pub fn count(&self, things: impl IntoIterator<Item = ([&'static str; N], u64)>) {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut sums: BTreeMap<_, u64> = known.keys().map(|values| (*values, 0)).collect();
        drop(known);
        things.into_iter().for_each(|(values, count)| *sums.entry(values).or_default() += count);
        sums.into_iter().for_each(|(values, sum)| self.of(values).set(sum));
    }
}

/// What stands behind a row.
pub(super) trait Series: Sync {
    /// Makes the series of a row that has few.
    fn preset(&self, metric: &Metric);

    /// Prints what there is.
    fn print(&self, metric: &Metric, encoder: &mut MetricEncoder<'_>) -> fmt::Result;
}

/// What one series prints behind its name and labels.
trait Sample {
    fn sample(&self, metric: &Metric, encoder: &mut MetricEncoder<'_>) -> fmt::Result;
}

#[expect(clippy::cast_precision_loss, reason = "whoever scrapes has floating-point numbers")]
fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

impl Sample for Number {
    fn sample(&self, metric: &Metric, encoder: &mut MetricEncoder<'_>) -> fmt::Result {
        let number = self.get();
        match (metric.kind, metric.unit) {
            (Kind::Counter, Unit::Seconds) => encoder.encode_counter::<NoLabelSet, _, f64>(&seconds(number), None),
            (Kind::Counter, _) => encoder.encode_counter::<NoLabelSet, _, f64>(&number, None),
            (_, Unit::Seconds) => encoder.encode_gauge(&seconds(number)),
            _ => encoder.encode_gauge(&number),
        }
    }
}

impl Sample for Times {
    fn sample(&self, _: &Metric, encoder: &mut MetricEncoder<'_>) -> fmt::Result {
        let bounds = BUCKETS.iter().map(|micros| seconds(*micros)).chain([f64::INFINITY]);
        let buckets: Vec<_> = bounds.zip(self.buckets.iter().map(|count| count.load(Relaxed))).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(seconds(self.micros.load(Relaxed)), count, &buckets, None)
    }
}

macro_rules! without_labels {
    ($($kind:ty),+) => {
        $(impl Series for $kind {
            fn preset(&self, _: &Metric) {}

            fn print(&self, metric: &Metric, encoder: &mut MetricEncoder<'_>) -> fmt::Result {
                self.sample(metric, encoder)
            }
        })+
    };
}

without_labels!(Number, Times);

impl<T: Sample + Default + Send + Sync, const N: usize> Series for By<T, N> {
    fn preset(&self, metric: &Metric) {
        let mut all: Vec<Vec<&'static str>> = vec![Vec::new()];
        for label in metric.labels {
            let Some(words) = label.values.words() else { return };
            all =
                all.iter().flat_map(|before| words.iter().map(move |word| [&before[..], &[*word]].concat())).collect();
        }
        if all.len() <= PRESET_MAX {
            for values in all {
                self.of(values.try_into().expect("the row has as many labels as its series"));
            }
        }
    }

    fn print(&self, metric: &Metric, encoder: &mut MetricEncoder<'_>) -> fmt::Result {
        for (values, one) in &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            let labels: Vec<(&str, &str)> = metric.labels.iter().map(|label| label.name).zip(*values).collect();
            one.sample(metric, &mut encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
