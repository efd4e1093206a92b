//! Wall-clock times as text for people and JSON. Owns no clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAY_SECS: i64 = 86_400;
/// 0000-01-01T00:00:00Z and 9999-12-31T23:59:59Z: RFC 3339 §5.6 has four digits for the year.
const FIRST_SECS: i64 = -62_167_219_200;
const LAST_SECS: i64 = 253_402_300_799;

/// The time in UTC by RFC 3339, cut to whole seconds: `2026-03-01T12:00:00Z`. Times outside the years 0 to 9999 become
/// the nearest one inside.
pub fn rfc3339(time: SystemTime) -> String {
    let secs = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_secs()).unwrap_or(LAST_SECS),
        // Cut downwards, as after the epoch: half a second before it still belongs to the second before it.
        Err(before) => {
            let before = before.duration();
            let whole = i64::try_from(before.as_secs()).unwrap_or(i64::MAX - 1);
            -(whole + i64::from(before.subsec_nanos() > 0))
        }
    };
    let secs = secs.clamp(FIRST_SECS, LAST_SECS);
    let (year, month, day) = civil_date(secs.div_euclid(DAY_SECS));
    let of_day = secs.rem_euclid(DAY_SECS);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The same with milliseconds, for records of which many fall into one second: `2026-03-01T12:00:00.250Z`.
pub fn rfc3339_millis(time: SystemTime) -> String {
    let mut text = rfc3339(time);
    // Counted from the second before, on both sides of the epoch.
    let millis = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => after.subsec_millis(),
        Err(before) => (1000 - before.duration().subsec_nanos().div_ceil(1_000_000)) % 1000,
    };
    text.truncate(text.len() - 1);
    text + &format!(".{millis:03}Z")
}

/// Reads a time by RFC 3339, with any offset and any number of digits for the fraction; `None` when it is none. A day
/// alone is its beginning in UTC.
pub fn parse_rfc3339(text: &str) -> Option<SystemTime> {
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<i64>().ok())?;
    let part = |from: usize, to: usize| number(text.get(from..to)?);
    let mark = |at: usize, marks: &[u8]| text.as_bytes().get(at).is_some_and(|byte| marks.contains(byte));
    let (year, month, day) = (part(0, 4)?, part(5, 7)?, part(8, 10)?);
    let dated = mark(4, b"-") && mark(7, b"-") && (1..=12).contains(&month) && day >= 1;
    let days = days_before(year, month) + day - 1;
    // A day past the end of its month is a day of the next one.
    if !dated || civil_date(days) != (year, month, day) {
        return None;
    }
    let mut secs = days * DAY_SECS;
    let mut nanos = 0;
    if text.len() > 10 {
        let (hour, minute, second) = (part(11, 13)?, part(14, 16)?, part(17, 19)?);
        // A leap second is the last second that there is.
        if !mark(10, b"Tt ") || !mark(13, b":") || !mark(16, b":") || hour > 23 || minute > 59 || second > 60 {
            return None;
        }
        secs += hour * 3600 + minute * 60 + second.min(59);
        let rest = text.get(19..)?;
        let digits = rest
            .strip_prefix('.')
            .map_or("", |rest| &rest[..rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len())]);
        let zone = rest.strip_prefix('.').map_or(rest, |rest| &rest[digits.len()..]);
        if rest.starts_with('.') && digits.is_empty() {
            return None;
        }
        nanos = format!("{digits:0<9}")[..9].parse::<u32>().ok()?;
        secs -= match zone {
            "Z" | "z" => 0,
            _ => {
                let sign = match zone.as_bytes().first()? {
                    b'+' => 1,
                    b'-' => -1,
                    _ => return None,
                };
                let (hours, minutes) = zone.get(1..)?.split_once(':')?;
                let (hours, minutes) = (number(hours)?, number(minutes)?);
                if zone.len() != 6 || hours > 23 || minutes > 59 {
                    return None;
                }
                sign * (hours * 3600 + minutes * 60)
            }
        };
    }
    let whole = Duration::from_secs(secs.unsigned_abs());
    let time = if secs >= 0 { UNIX_EPOCH.checked_add(whole) } else { UNIX_EPOCH.checked_sub(whole) };
    time?.checked_add(Duration::from_nanos(nanos.into()))
}

/// Days from 1970-01-01 to the first day of a month, by the same calendar as [`civil_date`].
fn days_before(year: i64, month: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar. Years are taken to begin in March,
/// so that the leap day is the last of its year, and to fall into eras of 400 years, which all have 146 097 days.
fn civil_date(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // March to July and August to December both have 31, 30, 31, 30, 31 days: 153 days are five months.
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after_epoch(secs: u64) -> String {
        rfc3339(UNIX_EPOCH + Duration::from_secs(secs))
    }

    #[test]
    fn known_times_are_written_as_the_calendar_has_them() {
        assert_eq!(after_epoch(0), "1970-01-01T00:00:00Z");
        assert_eq!(after_epoch(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(after_epoch(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(after_epoch(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(after_epoch(1_735_689_599), "2024-12-31T23:59:59Z");
        assert_eq!(after_epoch(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn fractions_are_cut_downwards_on_both_sides_of_the_epoch() {
        assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_millis(999)), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(UNIX_EPOCH - Duration::from_millis(1)), "1969-12-31T23:59:59Z");
    }

    #[test]
    fn a_time_past_four_digits_is_the_last_that_fits() {
        assert_eq!(after_epoch(1 << 40), "9999-12-31T23:59:59Z");
    }

    #[test]
    fn milliseconds_count_upwards_on_both_sides_of_the_epoch() {
        assert_eq!(rfc3339_millis(UNIX_EPOCH + Duration::from_micros(1_250_999)), "1970-01-01T00:00:01.250Z");
        assert_eq!(rfc3339_millis(UNIX_EPOCH - Duration::from_millis(1)), "1969-12-31T23:59:59.999Z");
        assert_eq!(rfc3339_millis(UNIX_EPOCH - Duration::from_secs(1)), "1969-12-31T23:59:59.000Z");
    }

    #[test]
    fn what_was_written_is_read_as_the_same_time() {
        for millis in [0, 951_782_400_000, 1_709_251_199_999, 1_767_225_600_001, 4_107_542_400_500] {
            let time = UNIX_EPOCH + Duration::from_millis(millis);
            assert_eq!(parse_rfc3339(&rfc3339_millis(time)), Some(time));
        }
    }

    #[test]
    fn times_of_other_zones_and_days_alone_are_read() {
        let noon = parse_rfc3339("2026-03-01T12:00:00Z");
        assert!(noon.is_some());
        for same in ["2026-03-01T14:30:00+02:30", "2026-03-01 12:00:00.000z", "2026-03-01t04:00:00-08:00"] {
            assert_eq!(parse_rfc3339(same), noon, "{same}");
        }
        assert_eq!(parse_rfc3339("2026-03-01"), parse_rfc3339("2026-03-01T00:00:00Z"));
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for bad in [
            "",
            "now",
            "2026",
            "2026-13-01",
            "2026-02-29",
            "2026-04-31",
            "2026-03-01T12:00",
            "2026-03-01T12:00:00",
            "2026-03-01T24:00:00Z",
            "2026-03-01T12:00:00.Z",
            "2026-03-01T12:00:00+2",
            "2026-03-01T12:00:00+0x:00",
            "2026-03-01T12:00:00Zulu",
            "+026-03-01",
            "2026-03-01T12:00:00é",
            "2026-00-10",
            "2026-03-00",
        ] {
            assert_eq!(parse_rfc3339(bad), None, "{bad}");
        }
    }
}
