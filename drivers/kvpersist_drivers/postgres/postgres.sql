--- provision
CREATE TABLE IF NOT EXISTS {table} (
    key text COLLATE "C" PRIMARY KEY,
    value bytea NOT NULL,
    version bytea NOT NULL,
    expires_at double precision -- seconds since 1970; NULL: never
);
CREATE INDEX IF NOT EXISTS {index} ON {table} (expires_at) WHERE expires_at IS NOT NULL;

--- server
SELECT
    current_setting('server_version') AS version,
    current_setting('server_version_num')::int AS number,
    pg_encoding_to_char((SELECT encoding FROM pg_database WHERE datname = current_database())) AS encoding,
    current_setting('fsync') = 'on' AND current_setting('synchronous_commit') <> 'off' AS durable,
    current_setting('default_transaction_isolation') AS isolation,
    to_regclass($1)::oid::int8 AS oid

--- columns
SELECT
    (SELECT string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || coalesce(' ' || c.collname, ''),
                       ', ' ORDER BY a.attname COLLATE "C")
     FROM pg_attribute a LEFT JOIN pg_collation c ON c.oid = a.attcollation
     WHERE a.attrelid = $1::int8::oid AND a.attnum > 0 AND NOT a.attisdropped)
    || CASE WHEN EXISTS (
        SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = $1::int8::oid AND i.indisunique AND i.indpred IS NULL
          AND i.indnkeyatts = 1 AND a.attname = 'key'
    ) THEN '' ELSE ', key not unique' END

--- get
SELECT key, value, version, expires_at FROM {table}
WHERE key = any($1::text[]) AND (expires_at IS NULL OR expires_at > $2::float8)

--- put
-- Puts without conditions. $1..$4: columns; $5: the table's number; $6: whether to lock it as a whole;
-- $7, $8: the channel, and what is told there. Locks come first, in the order of their numbers.
WITH held AS MATERIALIZED (
    SELECT
        count(CASE
            WHEN l IS NOT NULL THEN pg_advisory_xact_lock($5::int4, l)::text
            WHEN $6::bool THEN pg_advisory_xact_lock($5::int4, 1)::text
            ELSE pg_advisory_xact_lock_shared($5::int4, 1)::text
        END) AS n,
        CASE WHEN $8::text IS NOT NULL THEN pg_notify($7::text, $8::text)::text END AS told
    FROM unnest(array_prepend(NULL, ARRAY(
        SELECT DISTINCT coalesce(nullif(hashtext(k COLLATE "C"), 1), 2)
        FROM unnest($1::text[]) AS k WHERE NOT $6::bool ORDER BY 1
    ))) AS l
)
INSERT INTO {table} (key, value, version, expires_at)
SELECT u.* FROM held, unnest($1::text[], $2::bytea[], $3::bytea[], $4::float8[]) AS u WHERE held.n > 0
ON CONFLICT (key) DO UPDATE
SET value = excluded.value, version = excluded.version, expires_at = excluded.expires_at

--- apply
-- Executed several times in one transaction and one round trip, each time on a fresh snapshot: first, with $2,
-- for the locks of all keys; then once for each wave of batches. $1: the table's number; $3..$9: the operations;
-- $10: now; $11: the channel. Answers the operations whose condition does not hold.
WITH op AS MATERIALIZED (
    SELECT * FROM unnest($3::text[], $4::int4[], $5::int4[], $6::bytea[], $7::bytea[], $8::bytea[], $9::float8[])
    AS op (key, act, batch, expect, value, version, expires_at)
    WHERE $2::text IS NULL
), failed AS MATERIALIZED (
    SELECT op.batch, op.key, live.version
    FROM op LEFT JOIN {table} AS live
        ON live.key = op.key AND (live.expires_at IS NULL OR live.expires_at > $10::float8)
    WHERE op.expect IS NOT NULL AND coalesce(live.version, '') <> op.expect
), done AS MATERIALIZED (
    SELECT * FROM op WHERE act > 0 AND batch NOT IN (SELECT batch FROM failed)
), put AS (
    INSERT INTO {table} (key, value, version, expires_at)
    SELECT key, value, version, expires_at FROM done WHERE act = 1
    ON CONFLICT (key) DO UPDATE
    SET value = excluded.value, version = excluded.version, expires_at = excluded.expires_at
), deleted AS (
    DELETE FROM {table} AS t USING done WHERE t.key = done.key AND done.act = 2
), changed AS (
    SELECT string_agg(key, E'\x01\x03') AS keys FROM done WHERE $11::text IS NOT NULL
)
SELECT batch, key, version FROM failed
UNION ALL
SELECT NULL, NULL, NULL FROM changed WHERE keys IS NOT NULL
    AND pg_notify($11::text, CASE WHEN octet_length(keys) < 7900 THEN keys ELSE '' END)::text IS NULL
UNION ALL
SELECT NULL, NULL, NULL FROM unnest(CASE WHEN $2::text IS NOT NULL THEN array_prepend(NULL, ARRAY(
    SELECT number * 2 + bool_or(act > 0)::int
    FROM (
        SELECT coalesce(nullif(hashtext(key COLLATE "C"), 1), 2)::int8 AS number, act
        FROM unnest($3::text[], $4::int4[]) AS op (key, act) WHERE $2::text = 'keys'
    ) AS wanted
    GROUP BY number ORDER BY number
)) END) AS l
WHERE CASE
    WHEN l IS NULL AND $2::text = 'table' THEN pg_advisory_xact_lock($1::int4, 1)::text
    WHEN l IS NULL THEN pg_advisory_xact_lock_shared($1::int4, 1)::text
    WHEN l & 1 = 1 THEN pg_advisory_xact_lock($1::int4, (l >> 1)::int4)::text
    ELSE pg_advisory_xact_lock_shared($1::int4, (l >> 1)::int4)::text
END IS NULL

--- scan
SELECT key, value, version, expires_at FROM {table}
WHERE (expires_at IS NULL OR expires_at > $1::float8) AND {range}
ORDER BY key {order} LIMIT $2

--- keys
SELECT key, version, expires_at FROM {table}
WHERE (expires_at IS NULL OR expires_at > $1::float8) AND {range}
ORDER BY key {order} LIMIT $2

--- deref
SELECT e.key, e.value, e.version, e.expires_at, t.key, t.value, t.version, t.expires_at
FROM (
    SELECT key, value, version, expires_at FROM {table}
    WHERE (expires_at IS NULL OR expires_at > $1::float8) AND {range}
    ORDER BY key {order} LIMIT $2
) AS e
LEFT JOIN {table} AS t
    ON t.key = $3::text || replace(convert_from(e.value, 'UTF8'), E'\x01', E'\x01\x02')
    AND (t.expires_at IS NULL OR t.expires_at > $1::float8)
ORDER BY e.key {order}

--- compact
DELETE FROM {table} WHERE key = any(ARRAY(
    SELECT key FROM {table} WHERE expires_at <= $1::float8 ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED
))
RETURNING 1
