-- The tables that the log rebuilds. Everything here may be dropped and made again from FORGE_EVENTS.

create table projection_checkpoint (
    projection text primary key,
    version integer not null,
    seq bigint not null
);

-- D2: every job, as the log tells it.
create table generation_queue (
    id uuid primary key,
    priority smallint not null default 5 check (priority between 1 and 10),
    job_type text not null,
    asset_type text not null,
    job_params jsonb not null,
    status text not null default 'pending',
    attempts integer not null default 0,
    max_attempts integer not null default 3,
    locked_by text,
    locked_at timestamptz,
    error_code text,
    error_message text,
    created_at timestamptz not null,
    started_at timestamptz,
    completed_at timestamptz,
    retry_at timestamptz,
    user_id text not null,
    session_id text,
    character_id text,
    batch_id uuid,
    ttl_seconds bigint,
    backend text,
    reason text,
    cached boolean not null default false,
    assets jsonb not null default '[]',
    submitted_seq bigint not null,
    admitted_seq bigint not null,
    seq bigint not null
);
create index generation_queue_status_priority on generation_queue (status, priority);
create index generation_queue_locked on generation_queue (locked_by, locked_at);
create index generation_queue_recent on generation_queue (created_at desc, id desc);
create index generation_queue_user on generation_queue (user_id, created_at desc, id desc);
create index generation_queue_batch on generation_queue (batch_id) where batch_id is not null;

-- D1: one row for each content; who refers to it stands in asset_reference.
create table asset_inventory (
    id uuid primary key,
    asset_type text not null,
    category text,
    archetype_id text,
    variant_key text collate "C",
    file_path text not null,
    file_size_bytes bigint not null,
    format text not null,
    width integer not null,
    height integer not null,
    dimensions text generated always as (width || 'x' || height) stored,
    content_hash text not null unique,
    pixel_hash text not null,
    dominant_color text not null,
    generation_params jsonb not null,
    access_count bigint not null default 0,
    last_accessed_at timestamptz,
    created_at timestamptz not null,
    expires_at timestamptz,
    search text not null,
    seq bigint not null
);
create index asset_inventory_type on asset_inventory (asset_type, created_at desc, id desc);
create index asset_inventory_recent on asset_inventory (created_at desc, id desc);
create index asset_inventory_category on asset_inventory (category, created_at desc, id desc);
create index asset_inventory_archetype on asset_inventory (archetype_id, created_at desc, id desc);
create index asset_inventory_variant on asset_inventory (variant_key, created_at desc, id desc);
create index asset_inventory_expires on asset_inventory (expires_at);

-- Who made or asked for a content, and where it counts: one row for each job's picture.
create table asset_reference (
    asset_id uuid not null,
    job_id uuid not null,
    position integer not null,
    user_id text not null,
    session_id text,
    character_id text,
    file_size_bytes bigint not null,
    created_at timestamptz not null,
    expires_at timestamptz,
    seq bigint not null,
    primary key (asset_id, job_id, position)
);
create index asset_reference_user on asset_reference (user_id, created_at desc, asset_id desc);
create index asset_reference_character on asset_reference (character_id) where character_id is not null;
create index asset_reference_session on asset_reference (session_id) where session_id is not null;
create index asset_reference_job on asset_reference (job_id);

-- What came of jobs, by hour; durations in buckets of the twelfth root of two, in milliseconds.
create table generation_stats (
    hour timestamptz not null,
    job_type text not null,
    outcome text not null,
    duration_bucket smallint not null,
    jobs bigint not null default 0,
    run_ms bigint not null default 0,
    waited_ms bigint not null default 0,
    primary key (hour, job_type, outcome, duration_bucket)
);

-- D3: samples of resources.
create table resource_usage_log (
    id uuid primary key,
    "timestamp" timestamptz not null,
    metric_type text not null,
    metric_value bigint not null,
    metric_unit text not null,
    details jsonb not null default '{}',
    seq bigint not null
);
create index resource_usage_log_timestamp on resource_usage_log ("timestamp" desc);
create index resource_usage_log_metric_type on resource_usage_log (metric_type);
