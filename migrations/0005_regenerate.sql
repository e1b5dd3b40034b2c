-- Which asset a job was to draw again, and what came of it.
alter table generation_queue add column regenerates uuid, add column regenerated text;
create index generation_queue_regenerates on generation_queue (regenerates) where regenerates is not null;
