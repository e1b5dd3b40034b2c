-- A11: the pictures that users sent; a row goes when its upload expires. Made again from FORGE_EVENTS.
create table upload (
    id uuid primary key,
    user_id text not null,
    content_hash text not null,
    file_path text not null,
    file_size_bytes bigint not null,
    width integer not null,
    height integer not null,
    created_at timestamptz not null,
    expires_at timestamptz not null,
    seq bigint not null
);
create index upload_expires on upload (expires_at);
create index upload_content on upload (content_hash);
