//! Wall-clock times as text for people and JSON. Owns no clock.

use std::time::{SystemTime, UNIX_EPOCH};

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
    use std::time::Duration;

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
}
