//! `strftime_now` of chat templates: the directives of Python's `strftime` in the C locale.

use std::fmt::Write;

use time::OffsetDateTime;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

/// Returns the local time, UTC where the system does not tell its offset.
pub(in crate::text) fn now() -> OffsetDateTime {
    OffsetDateTime::now_local().unwrap_or_else(|_| OffsetDateTime::now_utc())
}

/// Writes `time` as `format` asks. Unknown directives stay as they are, as in glibc.
pub(in crate::text) fn strftime(format: &str, time: OffsetDateTime) -> String {
    let mut out = String::with_capacity(format.len() + 16);
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = characters.next();
        let unpadded = directive == Some('-');
        if unpadded {
            directive = characters.next();
        }
        let Some(directive) = directive else {
            out.push_str(if unpadded { "%-" } else { "%" });
            break;
        };
        let start = out.len();
        if !write_directive(&mut out, directive, time) {
            out.push('%');
            if unpadded {
                out.push('-');
            }
            out.push(directive);
        } else if unpadded {
            strip_padding(&mut out, start);
        }
    }
    out
}

/// Removes the zeros or spaces in front of the number that begins at `start`.
fn strip_padding(out: &mut String, start: usize) {
    let number = out.split_off(start);
    let stripped = number.trim_start_matches(['0', ' ']);
    out.push_str(if stripped.is_empty() { "0" } else { stripped });
}

/// Writes one directive and returns whether it is known.
fn write_directive(out: &mut String, directive: char, time: OffsetDateTime) -> bool {
    let month = MONTHS[usize::from(u8::from(time.month())) - 1];
    let day = DAYS[usize::from(time.weekday().number_days_from_monday())];
    let hour12 = match time.hour() % 12 {
        0 => 12,
        hour => hour,
    };
    let (offset_hours, offset_minutes, _) = time.offset().as_hms();
    let sign = if time.offset().is_negative() {
        '-'
    } else {
        '+'
    };
    let written = match directive {
        'Y' => write!(out, "{}", time.year()),
        'y' => write!(out, "{:02}", time.year().rem_euclid(100)),
        'm' => write!(out, "{:02}", u8::from(time.month())),
        'd' => write!(out, "{:02}", time.day()),
        'e' => write!(out, "{:2}", time.day()),
        'H' => write!(out, "{:02}", time.hour()),
        'I' => write!(out, "{hour12:02}"),
        'M' => write!(out, "{:02}", time.minute()),
        'S' => write!(out, "{:02}", time.second()),
        'f' => write!(out, "{:06}", time.microsecond()),
        'j' => write!(out, "{:03}", time.ordinal()),
        'B' => write!(out, "{month}"),
        'b' | 'h' => write!(out, "{}", &month[..3]),
        'A' => write!(out, "{day}"),
        'a' => write!(out, "{}", &day[..3]),
        'w' => write!(out, "{}", time.weekday().number_days_from_sunday()),
        'u' => write!(out, "{}", time.weekday().number_from_monday()),
        'U' => write!(out, "{:02}", time.sunday_based_week()),
        'W' => write!(out, "{:02}", time.monday_based_week()),
        'V' => write!(out, "{:02}", time.iso_week()),
        'p' => write!(out, "{}", if time.hour() < 12 { "AM" } else { "PM" }),
        's' => write!(out, "{}", time.unix_timestamp()),
        'z' => write!(
            out,
            "{sign}{:02}{:02}",
            offset_hours.abs(),
            offset_minutes.abs()
        ),
        // Python's naive local time has no zone name.
        'Z' => Ok(()),
        'n' => out.write_char('\n'),
        't' => out.write_char('\t'),
        '%' => out.write_char('%'),
        'F' => return write_all(out, "%Y-%m-%d", time),
        'T' | 'X' => return write_all(out, "%H:%M:%S", time),
        'R' => return write_all(out, "%H:%M", time),
        'D' | 'x' => return write_all(out, "%m/%d/%y", time),
        'c' => return write_all(out, "%a %b %e %H:%M:%S %Y", time),
        'r' => return write_all(out, "%I:%M:%S %p", time),
        _ => return false,
    };
    written.is_ok()
}

fn write_all(out: &mut String, format: &str, time: OffsetDateTime) -> bool {
    out.push_str(&strftime(format, time));
    true
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn directives_are_those_of_python() {
        let time = datetime!(2024-07-06 15:04:05.000678 +02:30);
        let cases = [
            ("%d %b %Y", "06 Jul 2024"),
            ("%-d %B %Y, %A", "6 July 2024, Saturday"),
            ("%Y-%m-%dT%H:%M:%S.%f%z", "2024-07-06T15:04:05.000678+0230"),
            (
                "%I:%M %p|%j|%y|%e|%F|%R",
                "03:04 PM|188|24| 6|2024-07-06|15:04",
            ),
            ("%c", "Sat Jul  6 15:04:05 2024"),
            ("100%% %Q %", "100% %Q %"),
        ];
        for (format, want) in cases {
            assert_eq!(strftime(format, time), want, "{format}");
        }
    }
}
