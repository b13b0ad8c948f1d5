//! JSON bodies, read as the original reads them: one value, unknown fields and trailing bytes ignored, no
//! matter what Content-Type says.

use super::App;
use super::error::ApiError;
use axum::extract::{FromRequest, Request};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

/// How long a client may take to send a body.
const BODY_READ_MAX: Duration = Duration::from_secs(60);

/// A decoded body.
#[derive(Debug)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let body = read(request, app).await?;
        decode(&body).map(Self)
    }
}

/// A decoded body that is an array of objects.
#[derive(Debug)]
pub struct JsonList<T>(pub Vec<Object<T>>);

impl<T: DeserializeOwned> FromRequest<App> for JsonList<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let body = read(request, app).await?;
        decode_value(&body).map(Self)
    }
}

/// A decoded body, where an empty one means that everything is as usual.
#[derive(Debug)]
pub struct OptionalJson<T>(pub T);

impl<T: DeserializeOwned + Default> FromRequest<App> for OptionalJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let body = read(request, app).await?;
        if body.iter().all(u8::is_ascii_whitespace) {
            Ok(Self(T::default()))
        } else {
            decode(&body).map(Self)
        }
    }
}

async fn read(request: Request, app: &App) -> Result<Bytes, ApiError> {
    let bytes_max = app.registry.foundation().config.http.body_max_bytes;
    let body = Limited::new(request.into_body(), bytes_max).collect();
    let body = tokio::time::timeout(BODY_READ_MAX, body).await.map_err(|_| ApiError::BodyTimedOut)?;
    let body = body.map_err(|error| {
        if error.downcast_ref::<LengthLimitError>().is_some() {
            ApiError::TooLarge(bytes_max)
        } else {
            ApiError::Body(format!("the body could not be read: {error}"))
        }
    })?;
    Ok(body.to_bytes())
}

/// A JSON object. Without this serde would also read an array as the fields of a struct, in order.
#[derive(Debug, Default)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
    type Value = Object<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Object)
    }
}

/// Decodes one object; an error names the field.
///
/// # Errors
/// [`ApiError::Body`].
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    decode_value(bytes).map(|Object(value)| value)
}

fn decode_value<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        match path.as_str() {
            // The value as a whole, or text that is not JSON at all.
            "." | "?" => ApiError::Body(format!("invalid JSON body: {inner}")),
            field => ApiError::Body(format!("{field}: {inner}")),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize, PartialEq)]
    struct Body {
        a: Option<u32>,
        b: Option<Vec<String>>,
    }

    #[test]
    fn lenient_where_clients_need_it_and_exact_about_the_field() {
        let decode = |text: &str| decode::<Body>(text.as_bytes()).map_err(|error| error.to_string());
        assert_eq!(decode(r#"{"a":null,"b":null,"x":{}} trailing"#), Ok(Body { a: None, b: None }));
        assert!(decode(r#"{"a":-1}"#).unwrap_err().starts_with("a: "));
        assert!(decode(r#"{"b":["x",1]}"#).unwrap_err().starts_with("b[1]: "));
        assert!(decode("{").unwrap_err().contains("invalid JSON body"));
        assert!(decode("").is_err() && decode("[1]").is_err());
    }
}
