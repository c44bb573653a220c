-- A store that the first schema (revision 0001) made, as SQLite dumps it.
BEGIN TRANSACTION;
CREATE TABLE autoq_alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT autoq_alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "autoq_alembic_version" VALUES('0001');
CREATE TABLE export (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	plan_id INTEGER NOT NULL, 
	container VARCHAR NOT NULL, 
	path VARCHAR NOT NULL, 
	status VARCHAR NOT NULL, 
	bytes_written BIGINT, 
	verification JSON NOT NULL, 
	started DATETIME NOT NULL, 
	finished DATETIME, 
	CONSTRAINT pk_export PRIMARY KEY (id), 
	CONSTRAINT fk_export_study_id_study FOREIGN KEY(study_id) REFERENCES study (id) ON DELETE CASCADE, 
	CONSTRAINT fk_export_plan_id_plan FOREIGN KEY(plan_id) REFERENCES "plan" (id) ON DELETE CASCADE
);
CREATE TABLE export_file (
	id INTEGER NOT NULL, 
	export_id INTEGER NOT NULL, 
	path VARCHAR NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	CONSTRAINT pk_export_file PRIMARY KEY (id), 
	CONSTRAINT uq_export_file_export_id_path UNIQUE (export_id, path), 
	CONSTRAINT fk_export_file_export_id_export FOREIGN KEY(export_id) REFERENCES export (id) ON DELETE CASCADE
);
CREATE TABLE lease (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	owner VARCHAR NOT NULL, 
	host VARCHAR NOT NULL, 
	pid_namespace VARCHAR NOT NULL, 
	pid BIGINT NOT NULL, 
	process_started DOUBLE NOT NULL, 
	acquired DATETIME NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	expires DATETIME NOT NULL, 
	CONSTRAINT pk_lease PRIMARY KEY (id), 
	CONSTRAINT uq_lease_study_id UNIQUE (study_id), 
	CONSTRAINT fk_lease_study_id_study FOREIGN KEY(study_id) REFERENCES study (id) ON DELETE CASCADE
);
CREATE TABLE measurement (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	plan_id INTEGER, 
	label VARCHAR NOT NULL, 
	metric VARCHAR NOT NULL, 
	value DOUBLE, 
	interval_low DOUBLE, 
	interval_high DOUBLE, 
	details JSON NOT NULL, 
	tokens BIGINT, 
	data_sha256 VARCHAR, 
	created DATETIME NOT NULL, 
	CONSTRAINT pk_measurement PRIMARY KEY (id), 
	CONSTRAINT fk_measurement_study_id_study FOREIGN KEY(study_id) REFERENCES study (id) ON DELETE CASCADE, 
	CONSTRAINT fk_measurement_plan_id_plan FOREIGN KEY(plan_id) REFERENCES "plan" (id) ON DELETE CASCADE
);
INSERT INTO "measurement" VALUES(1,1,1,'4.8 bits','kl_divergence',0.03125,0.03,0.04,'{}',4096,'dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd','2026-11-21 12:31:47.436878');
CREATE TABLE "plan" (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	label VARCHAR NOT NULL, 
	created DATETIME NOT NULL, 
	budget_bits DOUBLE NOT NULL, 
	effective_bits DOUBLE NOT NULL, 
	peer_effective_bits DOUBLE NOT NULL, 
	stored_bits_per_weight DOUBLE NOT NULL, 
	stored_bytes BIGINT NOT NULL, 
	predicted_loss DOUBLE, 
	predicted_loss_low DOUBLE, 
	predicted_loss_high DOUBLE, 
	bound DOUBLE, 
	gap DOUBLE, 
	assignment JSON NOT NULL, 
	content_sha256 VARCHAR NOT NULL, 
	CONSTRAINT pk_plan PRIMARY KEY (id), 
	CONSTRAINT uq_plan_study_id_content_sha256 UNIQUE (study_id, content_sha256), 
	CONSTRAINT fk_plan_study_id_study FOREIGN KEY(study_id) REFERENCES study (id) ON DELETE CASCADE
);
INSERT INTO "plan" VALUES(1,1,'4.8 bits','2026-11-21 12:31:47.428195',4.8,4.75,4.25,4.8125,123456,0.0123,0.01,0.015,0.0122,0.008,'{"layers.0.qkv": "nvfp4", "layers.0.mlp": "fp8"}','66b367d6b008bc0798caeef57f2675d06344f938fb3baef942089de9dfb5b3c7');
CREATE TABLE score_batch (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	batch_index BIGINT NOT NULL, 
	data BLOB NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	seconds DOUBLE NOT NULL, 
	CONSTRAINT pk_score_batch PRIMARY KEY (id), 
	CONSTRAINT uq_score_batch_study_id_batch_index UNIQUE (study_id, batch_index), 
	CONSTRAINT fk_score_batch_study_id_study FOREIGN KEY(study_id) REFERENCES study (id) ON DELETE CASCADE
);
CREATE TABLE sensitivity (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	group_name VARCHAR NOT NULL, 
	format_name VARCHAR NOT NULL, 
	score DOUBLE, 
	standard_error DOUBLE, 
	CONSTRAINT pk_sensitivity PRIMARY KEY (id), 
	CONSTRAINT uq_sensitivity_study_id_group_name_format_name UNIQUE (study_id, group_name, format_name), 
	CONSTRAINT fk_sensitivity_study_id_study FOREIGN KEY(study_id) REFERENCES study (id) ON DELETE CASCADE
);
CREATE TABLE stage (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	name VARCHAR NOT NULL, 
	status VARCHAR NOT NULL, 
	started DATETIME, 
	finished DATETIME, 
	seconds DOUBLE, 
	payload JSON NOT NULL, 
	CONSTRAINT pk_stage PRIMARY KEY (id), 
	CONSTRAINT uq_stage_study_id_name UNIQUE (study_id, name), 
	CONSTRAINT fk_stage_study_id_study FOREIGN KEY(study_id) REFERENCES study (id) ON DELETE CASCADE
);
CREATE TABLE stored_array (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	stage VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	dtype VARCHAR NOT NULL, 
	shape JSON NOT NULL, 
	data BLOB NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	CONSTRAINT pk_stored_array PRIMARY KEY (id), 
	CONSTRAINT uq_stored_array_study_id_stage_name UNIQUE (study_id, stage, name), 
	CONSTRAINT fk_stored_array_study_id_study FOREIGN KEY(study_id) REFERENCES study (id) ON DELETE CASCADE
);
CREATE TABLE study (
	id INTEGER NOT NULL, 
	name VARCHAR NOT NULL, 
	"key" VARCHAR NOT NULL, 
	status VARCHAR NOT NULL, 
	created DATETIME NOT NULL, 
	updated DATETIME NOT NULL, 
	model_path VARCHAR NOT NULL, 
	model_fingerprint VARCHAR NOT NULL, 
	architecture VARCHAR NOT NULL, 
	configuration JSON NOT NULL, 
	versions JSON NOT NULL, 
	seed BIGINT NOT NULL, 
	schema_version BIGINT NOT NULL, 
	CONSTRAINT pk_study PRIMARY KEY (id), 
	CONSTRAINT uq_study_name UNIQUE (name), 
	CONSTRAINT uq_study_key UNIQUE ("key")
);
INSERT INTO "study" VALUES(1,'llama-1a2b','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','todo','2026-11-21 12:31:47.377191','2026-11-21 12:31:47.435102','models/llama','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff','LlamaForCausalLM','{"formats": ["fp8", "nvfp4"]}','{"autoq": "0.1.0"}',0,1);
CREATE INDEX ix_measurement_study_id ON measurement (study_id);
CREATE INDEX ix_export_study_id ON export (study_id);
COMMIT;
