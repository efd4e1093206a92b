//! Series: the numbers behind a row of the table, as atomics that any thread may change, and how each is printed.
//! Owned by [`Metrics`](super::Metrics). Only labels whose values the table does not list are looked up under a lock.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use prometheus_client::encoding::{MetricEncoder, NoLabelSet};

use super::{Kind, Metric, Unit};

/// Upper bounds of the buckets of every histogram, in microseconds: few, since each costs a series for each value of
/// its labels. Below a millisecond is the gateway's own work, above 25 s is what waits for an executor.
const BUCKETS: [u64; 8] = [1_000, 5_000, 25_000, 100_000, 500_000, 2_500_000, 25_000_000, 300_000_000];

/// Rows with at most so many series print those at zero too: one that first appears with its first event hides that
/// event from `increase()`.
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

    /// From the one to the other, for whoever knows a part of it.
    pub fn change(&self, from: u64, to: u64) {
        self.add(to.wrapping_sub(from));
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
pub struct By<T, const N: usize> {
    /// Those of the table's words: found without a lock.
    known: OnceLock<Known<T, N>>,
    /// Those of words that the table only describes.
    found: RwLock<BTreeMap<[&'static str; N], Arc<T>>>,
}

#[derive(Debug)]
struct Known<T, const N: usize> {
    words: [&'static [&'static str]; N],
    /// The last label's values follow each other.
    series: Vec<Arc<T>>,
}

impl<T, const N: usize> Default for By<T, N> {
    fn default() -> Self {
        Self { known: OnceLock::new(), found: RwLock::default() }
    }
}

impl<T, const N: usize> Known<T, N> {
    fn get(&self, values: &[&'static str; N]) -> Option<&Arc<T>> {
        let index = values.iter().zip(self.words).try_fold(0, |index, (value, words)| {
            Some(index * words.len() + words.iter().position(|word| word == value)?)
        });
        self.series.get(index?)
    }

    fn iter(&self) -> impl Iterator<Item = ([&'static str; N], &Arc<T>)> {
        self.series.iter().enumerate().map(|(mut index, series)| {
            let mut values = [""; N];
            for (value, words) in values.iter_mut().zip(self.words).rev() {
                *value = words[index % words.len()];
                index /= words.len();
            }
            (values, series)
        })
    }
}

impl<T: Default, const N: usize> By<T, N> {
    /// Does something with what is behind these values, which stand in the order of the row.
    pub fn with<R>(&self, values: [&'static str; N], f: impl FnOnce(&Arc<T>) -> R) -> R {
        if let Some(known) = self.known.get().and_then(|known| known.get(&values)) {
            return f(known);
        }
        if let Some(found) = self.found.read().unwrap_or_else(PoisonError::into_inner).get(&values) {
            return f(found);
        }
        f(self.found.write().unwrap_or_else(PoisonError::into_inner).entry(values).or_default())
    }

    /// What is behind these values, to be kept: whoever counts frames looks it up once.
    pub fn of(&self, values: [&'static str; N]) -> Arc<T> {
        self.with(values, Arc::clone)
    }

    /// Everything, the words of the table first.
    fn each(&self, mut see: impl FnMut([&'static str; N], &T)) {
        self.known.get().iter().flat_map(|known| known.iter()).for_each(|(values, one)| see(values, one));
        let found = self.found.read().unwrap_or_else(PoisonError::into_inner);
        found.iter().for_each(|(values, one)| see(*values, one));
    }
}

impl<const N: usize> By<Number, N> {
    /// One more.
    pub fn inc(&self, values: [&'static str; N]) {
        self.with(values, |number| number.inc());
    }

    /// Sets all levels as counted: each is the sum of what is given for its values, and 0 where nothing is.
    pub fn count(&self, things: impl IntoIterator<Item = ([&'static str; N], u64)>) {
        let mut sums = BTreeMap::new();
        self.each(|values, _| _ = sums.insert(values, 0));
        things.into_iter().for_each(|(values, count)| *sums.entry(values).or_default() += count);
        sums.into_iter().for_each(|(values, sum)| self.with(values, |number| number.set(sum)));
    }
}

impl<const N: usize> By<Times, N> {
    /// One thing took so long.
    pub fn observe(&self, values: [&'static str; N], time: Duration) {
        self.with(values, |times| times.observe(time));
    }
}

/// What stands behind a row.
pub(super) trait Series: Sync {
    /// Makes the series that the table lists.
    fn preset(&self, metric: &Metric);

    /// Prints what there is.
    fn print(&self, metric: &Metric, encoder: &mut MetricEncoder<'_>) -> fmt::Result;
}

/// What one series prints behind its name and labels.
trait Sample {
    fn is_zero(&self) -> bool;

    fn sample(&self, metric: &Metric, encoder: &mut MetricEncoder<'_>) -> fmt::Result;
}

#[expect(clippy::cast_precision_loss, reason = "whoever scrapes has floating-point numbers")]
fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

impl Sample for Number {
    fn is_zero(&self) -> bool {
        self.get() == 0
    }

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
    fn is_zero(&self) -> bool {
        self.buckets.iter().all(|count| count.load(Relaxed) == 0)
    }

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
        let words: Option<Vec<_>> = metric.labels.iter().map(|label| label.values.words()).collect();
        let Some(words) = words else { return };
        let words: [_; N] = words.try_into().expect("the row has as many labels as its series");
        let series = (0..words.iter().map(|words| words.len()).product()).map(|_| Arc::default()).collect();
        let _ = self.known.set(Known { words, series });
    }

    fn print(&self, metric: &Metric, encoder: &mut MetricEncoder<'_>) -> fmt::Result {
        let all = self.known.get().is_some_and(|known| known.series.len() <= PRESET_MAX);
        let mut printed = Ok(());
        self.each(|values, one| {
            if printed.is_ok() && (all || !one.is_zero()) {
                let labels: Vec<(&str, &str)> = metric.labels.iter().map(|label| label.name).zip(values).collect();
                printed = encoder.encode_family(&labels).and_then(|mut encoder| one.sample(metric, &mut encoder));
            }
        });
        printed
    }
}

#[cfg(test)]
mod tests {
    use super::super::Metrics;
    use super::*;

    #[test]
    fn a_series_of_the_table_is_found_by_its_values_and_no_other() {
        let metrics = Metrics::default();
        metrics.http_requests.inc(["connect", "4xx"]);
        metrics.http_requests.inc(["connect", "4xx"]);
        metrics.calls.inc(["shell", "ok"]);
        let mut seen = Vec::new();
        metrics.http_requests.each(|values, one| seen.extend((one.get() > 0).then(|| (values, one.get()))));
        assert_eq!(seen, [(["connect", "4xx"], 2)]);
        assert_eq!((metrics.calls.of(["shell", "ok"]).get(), metrics.calls.of(["shell", "failed"]).get()), (1, 0));
    }

    #[test]
    fn levels_that_nobody_counts_any_more_are_zero() {
        let metrics = Metrics::default();
        metrics.links.count([(["noise"], 1), (["relay"], 1), (["noise"], 1)]);
        assert_eq!(metrics.links.of(["noise"]).get(), 2);
        metrics.links.count([(["relay"], 1)]);
        assert_eq!((metrics.links.of(["noise"]).get(), metrics.links.of(["relay"]).get()), (0, 1));
    }

    #[test]
    fn a_duration_is_in_the_first_bucket_that_holds_it() {
        let times = Times::default();
        for micros in [0, 1_000, 1_001, 300_000_001] {
            times.observe(Duration::from_micros(micros));
        }
        let counts = times.buckets.iter().map(|count| count.load(Relaxed)).collect::<Vec<_>>();
        assert_eq!(counts, [2, 1, 0, 0, 0, 0, 0, 0, 1]);
    }
}
