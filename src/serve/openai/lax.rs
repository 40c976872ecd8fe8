//! Numbers and switches as pydantic's lax mode reads them, which is vLLM's.
//!
//! Clients in languages without whole numbers send `512.0`, forms and shell scripts send `"512"` and
//! `"true"`. Each function stands behind `deserialize_with` of an optional field, reads null as
//! absent, and refuses what has no such reading in the words of serde that [`super::super::body`]
//! turns into vLLM's.

use std::fmt;

use serde::de::{self, Deserializer, Unexpected, Visitor};

/// Reads a whole number: `5`, `5.0`, `"5"`, and a boolean as 1 or 0.
pub(super) fn integer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    struct IntegerVisitor;
    impl Visitor<'_> for IntegerVisitor {
        type Value = Option<i64>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("i64")
        }
        fn visit_unit<E: de::Error>(self) -> Result<Option<i64>, E> {
            Ok(None)
        }
        fn visit_bool<E: de::Error>(self, value: bool) -> Result<Option<i64>, E> {
            Ok(Some(i64::from(value)))
        }
        fn visit_i64<E: de::Error>(self, value: i64) -> Result<Option<i64>, E> {
            Ok(Some(value))
        }
        fn visit_u64<E: de::Error>(self, value: u64) -> Result<Option<i64>, E> {
            let out_of_range = || E::invalid_value(Unexpected::Unsigned(value), &self);
            i64::try_from(value).map(Some).map_err(|_| out_of_range())
        }
        fn visit_f64<E: de::Error>(self, value: f64) -> Result<Option<i64>, E> {
            whole(value)
                .map(Some)
                .ok_or_else(|| E::invalid_type(Unexpected::Float(value), &self))
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<Option<i64>, E> {
            let trimmed = text.trim();
            let value = trimmed.parse().ok();
            let value = value.or_else(|| trimmed.parse().ok().and_then(whole));
            value
                .map(Some)
                .ok_or_else(|| E::invalid_type(Unexpected::Str(text), &self))
        }
    }
    deserializer.deserialize_any(IntegerVisitor)
}

/// Reads a finite number: `0.5`, `1`, `"0.5"`, and a boolean as 1 or 0.
pub(super) fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    struct NumberVisitor;
    impl Visitor<'_> for NumberVisitor {
        type Value = Option<f64>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("f64")
        }
        fn visit_unit<E: de::Error>(self) -> Result<Option<f64>, E> {
            Ok(None)
        }
        fn visit_bool<E: de::Error>(self, value: bool) -> Result<Option<f64>, E> {
            Ok(Some(f64::from(u8::from(value))))
        }
        fn visit_i64<E: de::Error>(self, value: i64) -> Result<Option<f64>, E> {
            Ok(Some(value as f64))
        }
        fn visit_u64<E: de::Error>(self, value: u64) -> Result<Option<f64>, E> {
            Ok(Some(value as f64))
        }
        fn visit_f64<E: de::Error>(self, value: f64) -> Result<Option<f64>, E> {
            Ok(Some(value))
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<Option<f64>, E> {
            // JSON has no infinity, so no check behind this one expects it: `"inf"` and `"nan"` are
            // refused here.
            let value = text.trim().parse().ok();
            value
                .filter(|value: &f64| value.is_finite())
                .map(Some)
                .ok_or_else(|| E::invalid_type(Unexpected::Str(text), &self))
        }
    }
    deserializer.deserialize_any(NumberVisitor)
}

/// Reads a switch: a boolean, 0 or 1, or pydantic's words for them.
pub(super) fn switch<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    struct SwitchVisitor;
    impl Visitor<'_> for SwitchVisitor {
        type Value = Option<bool>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a boolean")
        }
        fn visit_unit<E: de::Error>(self) -> Result<Option<bool>, E> {
            Ok(None)
        }
        fn visit_bool<E: de::Error>(self, value: bool) -> Result<Option<bool>, E> {
            Ok(Some(value))
        }
        fn visit_i64<E: de::Error>(self, value: i64) -> Result<Option<bool>, E> {
            Err(E::invalid_type(Unexpected::Signed(value), &self))
        }
        fn visit_u64<E: de::Error>(self, value: u64) -> Result<Option<bool>, E> {
            match value {
                0 => Ok(Some(false)),
                1 => Ok(Some(true)),
                _ => Err(E::invalid_type(Unexpected::Unsigned(value), &self)),
            }
        }
        fn visit_f64<E: de::Error>(self, value: f64) -> Result<Option<bool>, E> {
            match whole(value) {
                Some(0) => Ok(Some(false)),
                Some(1) => Ok(Some(true)),
                _ => Err(E::invalid_type(Unexpected::Float(value), &self)),
            }
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<Option<bool>, E> {
            match text.trim().to_ascii_lowercase().as_str() {
                "1" | "true" | "t" | "yes" | "y" | "on" => Ok(Some(true)),
                "0" | "false" | "f" | "no" | "n" | "off" => Ok(Some(false)),
                _ => Err(E::invalid_type(Unexpected::Str(text), &self)),
            }
        }
    }
    deserializer.deserialize_any(SwitchVisitor)
}

/// Returns a float without a fraction as the whole number that it is, if 64 bits hold it.
fn whole(value: f64) -> Option<i64> {
    // 2^63 is a float, the largest i64 is not: the border itself is out of range.
    let limit = -(i64::MIN as f64);
    (value.fract() == 0.0 && value >= -limit && value < limit).then_some(value as i64)
}
