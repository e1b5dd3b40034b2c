-- Pins, and the indexes by which what is due and what is least used is found.

alter table asset_inventory add column pinned boolean not null default false;
alter table asset_reference add column pinned boolean not null default false;

create index asset_reference_due on asset_reference (expires_at, asset_id) where not pinned;
create index asset_inventory_unused on asset_inventory (coalesce(last_accessed_at, created_at), id)
    where not pinned;
