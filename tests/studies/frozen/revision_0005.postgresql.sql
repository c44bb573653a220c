--
-- PostgreSQL database dump
--


-- Dumped from database version 15.18 (Debian 15.18-0+deb12u1)
-- Dumped by pg_dump version 15.18 (Debian 15.18-0+deb12u1)

SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;

SET default_tablespace = '';

SET default_table_access_method = heap;

--
-- Name: autoq_alembic_version; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.autoq_alembic_version (
    version_num character varying(32) NOT NULL
);


--
-- Name: blob; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.blob (
    id bigint NOT NULL,
    sha256 character varying NOT NULL,
    size_bytes bigint NOT NULL
);


--
-- Name: blob_chunk; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.blob_chunk (
    id bigint NOT NULL,
    blob_id bigint NOT NULL,
    "position" bigint NOT NULL,
    data bytea NOT NULL
);


--
-- Name: blob_chunk_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.blob_chunk_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: blob_chunk_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.blob_chunk_id_seq OWNED BY public.blob_chunk.id;


--
-- Name: blob_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.blob_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: blob_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.blob_id_seq OWNED BY public.blob.id;


--
-- Name: export; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.export (
    id bigint NOT NULL,
    study_id bigint NOT NULL,
    plan_id bigint NOT NULL,
    container character varying NOT NULL,
    path character varying NOT NULL,
    status character varying NOT NULL,
    bytes_written bigint,
    verification json NOT NULL,
    started timestamp with time zone NOT NULL,
    finished timestamp with time zone,
    row_sha256 character varying
);


--
-- Name: export_file; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.export_file (
    id bigint NOT NULL,
    export_id bigint NOT NULL,
    path character varying NOT NULL,
    size_bytes bigint NOT NULL,
    sha256 character varying NOT NULL,
    row_sha256 character varying
);


--
-- Name: export_file_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.export_file_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: export_file_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.export_file_id_seq OWNED BY public.export_file.id;


--
-- Name: export_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.export_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: export_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.export_id_seq OWNED BY public.export.id;


--
-- Name: job; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.job (
    id bigint NOT NULL,
    public_id character varying NOT NULL,
    kind character varying NOT NULL,
    status character varying NOT NULL,
    study_name character varying,
    request json NOT NULL,
    request_sha256 character varying NOT NULL,
    created_by character varying NOT NULL,
    idempotency_key character varying,
    created timestamp with time zone NOT NULL,
    started timestamp with time zone,
    finished timestamp with time zone,
    attempts bigint NOT NULL,
    deaths bigint NOT NULL,
    worker character varying,
    progress json,
    problem json,
    result json
);


--
-- Name: job_event; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.job_event (
    id bigint NOT NULL,
    job_id bigint NOT NULL,
    "time" timestamp with time zone NOT NULL,
    kind character varying NOT NULL,
    data json NOT NULL
);


--
-- Name: job_event_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.job_event_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: job_event_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.job_event_id_seq OWNED BY public.job_event.id;


--
-- Name: job_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.job_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: job_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.job_id_seq OWNED BY public.job.id;


--
-- Name: job_lease; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.job_lease (
    id bigint NOT NULL,
    job_id bigint NOT NULL,
    owner character varying NOT NULL,
    host character varying NOT NULL,
    pid_namespace character varying NOT NULL,
    pid bigint NOT NULL,
    process_started double precision NOT NULL,
    acquired timestamp with time zone NOT NULL,
    heartbeat timestamp with time zone NOT NULL,
    expires timestamp with time zone NOT NULL,
    boot_id character varying,
    expires_uptime double precision
);


--
-- Name: job_lease_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.job_lease_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: job_lease_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.job_lease_id_seq OWNED BY public.job_lease.id;


--
-- Name: lease; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.lease (
    id bigint NOT NULL,
    study_id bigint NOT NULL,
    owner character varying NOT NULL,
    host character varying NOT NULL,
    pid_namespace character varying NOT NULL,
    pid bigint NOT NULL,
    process_started double precision NOT NULL,
    acquired timestamp with time zone NOT NULL,
    heartbeat timestamp with time zone NOT NULL,
    expires timestamp with time zone NOT NULL,
    boot_id character varying,
    expires_uptime double precision
);


--
-- Name: lease_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.lease_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: lease_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.lease_id_seq OWNED BY public.lease.id;


--
-- Name: measurement; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.measurement (
    id bigint NOT NULL,
    study_id bigint NOT NULL,
    plan_id bigint,
    label character varying NOT NULL,
    metric character varying NOT NULL,
    value double precision,
    interval_low double precision,
    interval_high double precision,
    details json NOT NULL,
    tokens bigint,
    data_sha256 character varying,
    created timestamp with time zone NOT NULL,
    row_sha256 character varying
);


--
-- Name: measurement_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.measurement_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: measurement_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.measurement_id_seq OWNED BY public.measurement.id;


--
-- Name: plan; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.plan (
    id bigint NOT NULL,
    study_id bigint NOT NULL,
    label character varying NOT NULL,
    created timestamp with time zone NOT NULL,
    budget_bits double precision NOT NULL,
    effective_bits double precision NOT NULL,
    peer_effective_bits double precision NOT NULL,
    stored_bits_per_weight double precision NOT NULL,
    stored_bytes bigint NOT NULL,
    predicted_loss double precision,
    predicted_loss_low double precision,
    predicted_loss_high double precision,
    bound double precision,
    gap double precision,
    assignment json NOT NULL,
    content_sha256 character varying NOT NULL,
    details json DEFAULT '{}'::json NOT NULL,
    row_sha256 character varying
);


--
-- Name: plan_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.plan_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: plan_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.plan_id_seq OWNED BY public.plan.id;


--
-- Name: runner; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.runner (
    id bigint NOT NULL,
    owner character varying NOT NULL,
    host character varying NOT NULL,
    pid_namespace character varying NOT NULL,
    pid bigint NOT NULL,
    process_started double precision NOT NULL,
    acquired timestamp with time zone NOT NULL,
    heartbeat timestamp with time zone NOT NULL,
    expires timestamp with time zone NOT NULL,
    boot_id character varying,
    expires_uptime double precision
);


--
-- Name: runner_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.runner_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: runner_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.runner_id_seq OWNED BY public.runner.id;


--
-- Name: score_batch; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.score_batch (
    id bigint NOT NULL,
    study_id bigint NOT NULL,
    batch_index bigint NOT NULL,
    data bytea NOT NULL,
    sha256 character varying NOT NULL,
    seconds double precision NOT NULL,
    row_sha256 character varying
);


--
-- Name: score_batch_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.score_batch_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: score_batch_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.score_batch_id_seq OWNED BY public.score_batch.id;


--
-- Name: sensitivity; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.sensitivity (
    id bigint NOT NULL,
    study_id bigint NOT NULL,
    group_name character varying NOT NULL,
    format_name character varying NOT NULL,
    score double precision,
    standard_error double precision,
    row_sha256 character varying
);


--
-- Name: sensitivity_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.sensitivity_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: sensitivity_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.sensitivity_id_seq OWNED BY public.sensitivity.id;


--
-- Name: stage; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.stage (
    id bigint NOT NULL,
    study_id bigint NOT NULL,
    name character varying NOT NULL,
    status character varying NOT NULL,
    started timestamp with time zone,
    finished timestamp with time zone,
    seconds double precision,
    payload json NOT NULL,
    fingerprint character varying,
    row_sha256 character varying
);


--
-- Name: stage_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.stage_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: stage_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.stage_id_seq OWNED BY public.stage.id;


--
-- Name: stored_array; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.stored_array (
    id bigint NOT NULL,
    study_id bigint NOT NULL,
    stage character varying NOT NULL,
    name character varying NOT NULL,
    dtype character varying NOT NULL,
    shape json NOT NULL,
    sha256 character varying NOT NULL,
    row_sha256 character varying
);


--
-- Name: stored_array_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.stored_array_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: stored_array_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.stored_array_id_seq OWNED BY public.stored_array.id;


--
-- Name: study; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.study (
    id bigint NOT NULL,
    name character varying NOT NULL,
    key character varying NOT NULL,
    status character varying NOT NULL,
    created timestamp with time zone NOT NULL,
    updated timestamp with time zone NOT NULL,
    model_path character varying NOT NULL,
    model_fingerprint character varying NOT NULL,
    architecture character varying NOT NULL,
    configuration json NOT NULL,
    versions json NOT NULL,
    seed bigint NOT NULL,
    schema_version bigint NOT NULL,
    row_sha256 character varying
);


--
-- Name: study_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.study_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: study_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.study_id_seq OWNED BY public.study.id;


--
-- Name: blob id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.blob ALTER COLUMN id SET DEFAULT nextval('public.blob_id_seq'::regclass);


--
-- Name: blob_chunk id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.blob_chunk ALTER COLUMN id SET DEFAULT nextval('public.blob_chunk_id_seq'::regclass);


--
-- Name: export id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.export ALTER COLUMN id SET DEFAULT nextval('public.export_id_seq'::regclass);


--
-- Name: export_file id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.export_file ALTER COLUMN id SET DEFAULT nextval('public.export_file_id_seq'::regclass);


--
-- Name: job id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job ALTER COLUMN id SET DEFAULT nextval('public.job_id_seq'::regclass);


--
-- Name: job_event id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job_event ALTER COLUMN id SET DEFAULT nextval('public.job_event_id_seq'::regclass);


--
-- Name: job_lease id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job_lease ALTER COLUMN id SET DEFAULT nextval('public.job_lease_id_seq'::regclass);


--
-- Name: lease id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.lease ALTER COLUMN id SET DEFAULT nextval('public.lease_id_seq'::regclass);


--
-- Name: measurement id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.measurement ALTER COLUMN id SET DEFAULT nextval('public.measurement_id_seq'::regclass);


--
-- Name: plan id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.plan ALTER COLUMN id SET DEFAULT nextval('public.plan_id_seq'::regclass);


--
-- Name: runner id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.runner ALTER COLUMN id SET DEFAULT nextval('public.runner_id_seq'::regclass);


--
-- Name: score_batch id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.score_batch ALTER COLUMN id SET DEFAULT nextval('public.score_batch_id_seq'::regclass);


--
-- Name: sensitivity id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.sensitivity ALTER COLUMN id SET DEFAULT nextval('public.sensitivity_id_seq'::regclass);


--
-- Name: stage id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.stage ALTER COLUMN id SET DEFAULT nextval('public.stage_id_seq'::regclass);


--
-- Name: stored_array id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.stored_array ALTER COLUMN id SET DEFAULT nextval('public.stored_array_id_seq'::regclass);


--
-- Name: study id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.study ALTER COLUMN id SET DEFAULT nextval('public.study_id_seq'::regclass);


--
-- Data for Name: autoq_alembic_version; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.autoq_alembic_version VALUES ('0005');


--
-- Data for Name: blob; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.blob VALUES (1, '345e042b4d37f82b4dbbfdfe199257c3f920ea0dcffa8de25e787626418d96cb', 140);
INSERT INTO public.blob VALUES (3, '936ff795e3cac02530ad2c467e6de10384fb67abc96053079f6c24ab28d53617', 4224);


--
-- Data for Name: blob_chunk; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.blob_chunk VALUES (1, 1, 0, '\x934e554d5059010076007b276465736372273a20273c6634272c2027666f727472616e5f6f72646572273a2046616c73652c20277368617065273a2028332c292c207d2020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020200a0000003f000000800000c07f');
INSERT INTO public.blob_chunk VALUES (2, 3, 0, '\x934e554d5059010076007b276465736372273a20277c7531272c2027666f727472616e5f6f72646572273a2046616c73652c20277368617065273a202831362c20323536292c207d202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020200a000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff');


--
-- Data for Name: export; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.export VALUES (1, 1, 1, 'modelopt', '/out', 'complete', 99, '{"tensors": 4}', '2026-11-22 06:14:23.410494+00', '2026-11-22 06:14:23.415623+00', '0199d45f2713b1fc2a6541c16c36532cae806b09159a0a2b72b066fe5b27d740');


--
-- Data for Name: export_file; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.export_file VALUES (1, 1, 'model.safetensors', 99, 'cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc', '65390b379d45e8199fa8da3ce37be83618a69445b231c68e0ad3ae9405beb0ce');


--
-- Data for Name: job; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.job VALUES (3, '43e703c1644c436fa3eac319224c631f', 'search', 'queued', NULL, '{"model": "bundled", "seed": 2}', 'ed96c989ae485f2fdd6f0bb0e4c74104a39161da6055e3b8cdf3ecc508cf464e', 'ada', 'key 2', '2026-11-22 06:14:23.431125+00', NULL, NULL, 0, 0, NULL, NULL, NULL, NULL);
INSERT INTO public.job VALUES (1, 'd088ecee4d3a4f8c9621f85c9041e986', 'search', 'done', 'llama-1a2b', '{"model": "bundled", "seed": 0}', '6038e9e64287eb2d4f98842a41c0faeeae2a94b0302dedda88b5eff9daf27679', 'ada', NULL, '2026-11-22 06:14:23.424856+00', '2026-11-22 06:14:23.442041+00', '2026-11-22 06:14:23.469337+00', 1, 0, 'node-1:4242', '{"task": "scoring", "done": 3, "total": 4}', NULL, '{"plan": 1}');
INSERT INTO public.job VALUES (2, 'f2de88d917f54ebb82e732eaa30d791e', 'search', 'running', NULL, '{"model": "bundled", "seed": 1}', '3ea5bd920197b5729dc46f71439f31b24204989f30f0d066b8449ea57af5ebb0', 'ada', 'key 1', '2026-11-22 06:14:23.429137+00', '2026-11-22 06:14:23.485232+00', NULL, 1, 0, 'node-1:4242', NULL, NULL, NULL);


--
-- Data for Name: job_event; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.job_event VALUES (1, 1, '2026-11-22 06:14:23.424856+00', 'status', '{"status": "queued"}');
INSERT INTO public.job_event VALUES (2, 2, '2026-11-22 06:14:23.429137+00', 'status', '{"status": "queued"}');
INSERT INTO public.job_event VALUES (3, 3, '2026-11-22 06:14:23.431125+00', 'status', '{"status": "queued"}');
INSERT INTO public.job_event VALUES (4, 1, '2026-11-22 06:14:23.442041+00', 'status', '{"status": "running"}');
INSERT INTO public.job_event VALUES (5, 1, '2026-11-22 06:14:23.454768+00', 'progress', '{"task": "scoring", "done": 3, "total": 4}');
INSERT INTO public.job_event VALUES (6, 1, '2026-11-22 06:14:23.454768+00', 'log', '{"text": "on"}');
INSERT INTO public.job_event VALUES (7, 1, '2026-11-22 06:14:23.469337+00', 'status', '{"status": "done"}');
INSERT INTO public.job_event VALUES (8, 2, '2026-11-22 06:14:23.485232+00', 'status', '{"status": "running"}');


--
-- Data for Name: job_lease; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.job_lease VALUES (2, 2, 'aeb9c5714584441ca528757755ac516c', 'node-1', 'pid:[1]', 4242, 77475.91000008583, '2026-01-01 00:00:00+00', '2026-01-01 00:00:00+00', '2026-01-01 00:00:00+00', 'boot-1', 77538.376320749);


--
-- Data for Name: lease; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.lease VALUES (1, 2, 'fdf5d7dbe9164d1ea912891b8f2e0bd3', 'node-1', 'pid:[1]', 4242, 77475.91000008583, '2026-01-01 00:00:00+00', '2026-01-01 00:00:00+00', '2026-01-01 00:00:00+00', 'boot-1', 78078.310077538);


--
-- Data for Name: measurement; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.measurement VALUES (1, 1, 1, '4.8 bits', 'kl_divergence', 0.03125, 0.03, 0.04, '{}', 4096, 'dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd', '2026-11-22 06:14:23.40667+00', '5e3b16b838956c0dc217b60d76a6ac1a05c22b57cd38216a526802bc4a608aa7');


--
-- Data for Name: plan; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.plan VALUES (1, 1, '4.8 bits', '2026-11-22 06:14:23.402457+00', 4.8, 4.75, 4.25, 4.8125, 123456, 0.0123, 0.01, 0.015, 0.0122, 0.008, '{"layers.0.qkv": "nvfp4", "layers.0.mlp": "fp8"}', '675c20fd6e0c21b06f7f0799629cdf326acbff22538d5d05b9ca5c142d1a0173', '{"takes": {"stored_bytes": 123456.0}}', 'c3cb1d1608a8817bc1f3877267023788792ddcfe24a585ee975cbdd825960dc2');


--
-- Data for Name: runner; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.runner VALUES (1, 'a runner', 'node-1', 'pid:[1]', 4242, 77475.91000008583, '2026-01-01 00:00:00+00', '2026-01-01 00:00:00+00', '2026-01-01 00:00:00+00', 'boot-1', 77538.380417089);


--
-- Data for Name: score_batch; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.score_batch VALUES (1, 1, 0, '\x934e554d5059010076007b276465736372273a20273c6638272c2027666f727472616e5f6f72646572273a2046616c73652c20277368617065273a2028322c20322c2032292c207d202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020200a00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000', '7eabece54e1fb6f8212ed5ef06839c96c355b50b05a314b436a82533b550185a', 0.5, '7e8470e9bfcc60df163dffe1078e89e75d73b84aa349900886f405c101dec8d9');
INSERT INTO public.score_batch VALUES (2, 1, 1, '\x934e554d5059010076007b276465736372273a20273c6638272c2027666f727472616e5f6f72646572273a2046616c73652c20277368617065273a2028322c20322c2032292c207d202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020200a000000000000d03f000000000000d03f000000000000d03f000000000000d03f000000000000d03f000000000000d03f000000000000d03f000000000000d03f', '9f35540c3a1d59d8c97110a15447bcb0bd91d0f1a137e5f0c7c73655621504a4', 0.5, 'd796665341cb4570ccddbd0f7fef633d19477d8bbb454d33298306f93588723b');


--
-- Data for Name: sensitivity; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.sensitivity VALUES (1, 1, 'layers.0.qkv', 'fp8', 0.125, 0.5, '5c1736cfad93271834b54a82808e9f4e66786bd3b240e0aaa3ced650466c4b24');
INSERT INTO public.sensitivity VALUES (2, 1, 'layers.0.mlp', 'fp8', NULL, NULL, 'd79541dc755e625e2aa3fd5eaa3c127d4ae27b5c8d9829fb1037d966eb37de7f');


--
-- Data for Name: stage; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.stage VALUES (1, 1, 'calibration', 'done', '2026-11-22 06:14:23.367343+00', '2026-11-22 06:14:23.381689+00', 1.5, '{"records": [], "tokens": 64}', NULL, 'd5da02bcb1e649ca9f95e035010c2ab5a05f9896e59a8f886c722b4cb3d0ea54');
INSERT INTO public.stage VALUES (2, 1, 'sensitivity', 'done', '2026-11-22 06:14:23.384853+00', '2026-11-22 06:14:23.399622+00', 1, '{"formats": ["fp8", "nvfp4"]}', NULL, '3caab2dcb4783a1cf15a2a7d2d3d2bddd948a86b4b8ed5b982fb9fdbd5148f97');


--
-- Data for Name: stored_array; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.stored_array VALUES (1, 1, 'calibration', 'scale', '<f4', '[3]', '345e042b4d37f82b4dbbfdfe199257c3f920ea0dcffa8de25e787626418d96cb', 'dbf78c56ac8d13f8410a1747923062e29acc95d111f6cd4620619e2976db221c');
INSERT INTO public.stored_array VALUES (2, 1, 'calibration', 'same as scale', '<f4', '[3]', '345e042b4d37f82b4dbbfdfe199257c3f920ea0dcffa8de25e787626418d96cb', 'f2eec38a3a44f573fa3e9adafa3daeadc46d6648c7b87b458cd69403eb432b88');
INSERT INTO public.stored_array VALUES (3, 1, 'calibration', 'codes', '|u1', '[16, 256]', '936ff795e3cac02530ad2c467e6de10384fb67abc96053079f6c24ab28d53617', '9e0757cf289c63fd096c78f97fcee1bcdc8d12d2cfe88b903f72c6206736e982');


--
-- Data for Name: study; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.study VALUES (1, 'llama-1a2b', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'done', '2026-11-22 06:14:23.349295+00', '2026-11-22 06:14:23.418267+00', 'models/llama', 'ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff', 'LlamaForCausalLM', '{"formats": ["fp8", "nvfp4"], "seed": 7}', '{"autoq": "0.1.0"}', 7, 3, '6890f9397b91e69fe7842d4c8bd86cc1175e6f8a872f7dac10f375c1b4c5604b');
INSERT INTO public.study VALUES (2, 'working', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'todo', '2026-11-22 06:14:23.418949+00', '2026-11-22 06:14:23.418949+00', 'models/other', 'eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee', 'MixtralForCausalLM', '{}', '{}', 0, 3, 'afb2f9cdc7d6613fab7b3b0c8fcb371d3288595bcb46835526e661069882b9a8');


--
-- Name: blob_chunk_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.blob_chunk_id_seq', 2, true);


--
-- Name: blob_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.blob_id_seq', 3, true);


--
-- Name: export_file_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.export_file_id_seq', 1, true);


--
-- Name: export_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.export_id_seq', 1, true);


--
-- Name: job_event_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.job_event_id_seq', 8, true);


--
-- Name: job_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.job_id_seq', 3, true);


--
-- Name: job_lease_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.job_lease_id_seq', 2, true);


--
-- Name: lease_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.lease_id_seq', 1, true);


--
-- Name: measurement_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.measurement_id_seq', 1, true);


--
-- Name: plan_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.plan_id_seq', 1, true);


--
-- Name: runner_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.runner_id_seq', 1, true);


--
-- Name: score_batch_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.score_batch_id_seq', 2, true);


--
-- Name: sensitivity_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.sensitivity_id_seq', 2, true);


--
-- Name: stage_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.stage_id_seq', 2, true);


--
-- Name: stored_array_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.stored_array_id_seq', 3, true);


--
-- Name: study_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.study_id_seq', 2, true);


--
-- Name: autoq_alembic_version autoq_alembic_version_pkc; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.autoq_alembic_version
    ADD CONSTRAINT autoq_alembic_version_pkc PRIMARY KEY (version_num);


--
-- Name: blob pk_blob; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.blob
    ADD CONSTRAINT pk_blob PRIMARY KEY (id);


--
-- Name: blob_chunk pk_blob_chunk; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.blob_chunk
    ADD CONSTRAINT pk_blob_chunk PRIMARY KEY (id);


--
-- Name: export pk_export; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.export
    ADD CONSTRAINT pk_export PRIMARY KEY (id);


--
-- Name: export_file pk_export_file; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.export_file
    ADD CONSTRAINT pk_export_file PRIMARY KEY (id);


--
-- Name: job pk_job; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job
    ADD CONSTRAINT pk_job PRIMARY KEY (id);


--
-- Name: job_event pk_job_event; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job_event
    ADD CONSTRAINT pk_job_event PRIMARY KEY (id);


--
-- Name: job_lease pk_job_lease; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job_lease
    ADD CONSTRAINT pk_job_lease PRIMARY KEY (id);


--
-- Name: lease pk_lease; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.lease
    ADD CONSTRAINT pk_lease PRIMARY KEY (id);


--
-- Name: measurement pk_measurement; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.measurement
    ADD CONSTRAINT pk_measurement PRIMARY KEY (id);


--
-- Name: plan pk_plan; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.plan
    ADD CONSTRAINT pk_plan PRIMARY KEY (id);


--
-- Name: runner pk_runner; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.runner
    ADD CONSTRAINT pk_runner PRIMARY KEY (id);


--
-- Name: score_batch pk_score_batch; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.score_batch
    ADD CONSTRAINT pk_score_batch PRIMARY KEY (id);


--
-- Name: sensitivity pk_sensitivity; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.sensitivity
    ADD CONSTRAINT pk_sensitivity PRIMARY KEY (id);


--
-- Name: stage pk_stage; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.stage
    ADD CONSTRAINT pk_stage PRIMARY KEY (id);


--
-- Name: stored_array pk_stored_array; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.stored_array
    ADD CONSTRAINT pk_stored_array PRIMARY KEY (id);


--
-- Name: study pk_study; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.study
    ADD CONSTRAINT pk_study PRIMARY KEY (id);


--
-- Name: blob_chunk uq_blob_chunk_blob_id_position; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.blob_chunk
    ADD CONSTRAINT uq_blob_chunk_blob_id_position UNIQUE (blob_id, "position");


--
-- Name: blob uq_blob_sha256; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.blob
    ADD CONSTRAINT uq_blob_sha256 UNIQUE (sha256);


--
-- Name: export_file uq_export_file_export_id_path; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.export_file
    ADD CONSTRAINT uq_export_file_export_id_path UNIQUE (export_id, path);


--
-- Name: job uq_job_created_by_idempotency_key; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job
    ADD CONSTRAINT uq_job_created_by_idempotency_key UNIQUE (created_by, idempotency_key);


--
-- Name: job_lease uq_job_lease_job_id; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job_lease
    ADD CONSTRAINT uq_job_lease_job_id UNIQUE (job_id);


--
-- Name: job uq_job_public_id; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job
    ADD CONSTRAINT uq_job_public_id UNIQUE (public_id);


--
-- Name: lease uq_lease_study_id; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.lease
    ADD CONSTRAINT uq_lease_study_id UNIQUE (study_id);


--
-- Name: plan uq_plan_study_id_content_sha256; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.plan
    ADD CONSTRAINT uq_plan_study_id_content_sha256 UNIQUE (study_id, content_sha256);


--
-- Name: score_batch uq_score_batch_study_id_batch_index; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.score_batch
    ADD CONSTRAINT uq_score_batch_study_id_batch_index UNIQUE (study_id, batch_index);


--
-- Name: sensitivity uq_sensitivity_study_id_group_name_format_name; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.sensitivity
    ADD CONSTRAINT uq_sensitivity_study_id_group_name_format_name UNIQUE (study_id, group_name, format_name);


--
-- Name: stage uq_stage_study_id_name; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.stage
    ADD CONSTRAINT uq_stage_study_id_name UNIQUE (study_id, name);


--
-- Name: stored_array uq_stored_array_study_id_stage_name; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.stored_array
    ADD CONSTRAINT uq_stored_array_study_id_stage_name UNIQUE (study_id, stage, name);


--
-- Name: study uq_study_key; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.study
    ADD CONSTRAINT uq_study_key UNIQUE (key);


--
-- Name: study uq_study_name; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.study
    ADD CONSTRAINT uq_study_name UNIQUE (name);


--
-- Name: ix_export_study_id; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_export_study_id ON public.export USING btree (study_id);


--
-- Name: ix_job_event_job_id_kind; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_job_event_job_id_kind ON public.job_event USING btree (job_id, kind);


--
-- Name: ix_job_status; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_job_status ON public.job USING btree (status);


--
-- Name: ix_job_study_name; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_job_study_name ON public.job USING btree (study_name);


--
-- Name: ix_measurement_study_id; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_measurement_study_id ON public.measurement USING btree (study_id);


--
-- Name: ix_stage_fingerprint; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_stage_fingerprint ON public.stage USING btree (fingerprint);


--
-- Name: ix_stored_array_sha256; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_stored_array_sha256 ON public.stored_array USING btree (sha256);


--
-- Name: blob_chunk fk_blob_chunk_blob_id_blob; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.blob_chunk
    ADD CONSTRAINT fk_blob_chunk_blob_id_blob FOREIGN KEY (blob_id) REFERENCES public.blob(id) ON DELETE CASCADE;


--
-- Name: export_file fk_export_file_export_id_export; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.export_file
    ADD CONSTRAINT fk_export_file_export_id_export FOREIGN KEY (export_id) REFERENCES public.export(id) ON DELETE CASCADE;


--
-- Name: export fk_export_plan_id_plan; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.export
    ADD CONSTRAINT fk_export_plan_id_plan FOREIGN KEY (plan_id) REFERENCES public.plan(id) ON DELETE CASCADE;


--
-- Name: export fk_export_study_id_study; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.export
    ADD CONSTRAINT fk_export_study_id_study FOREIGN KEY (study_id) REFERENCES public.study(id) ON DELETE CASCADE;


--
-- Name: job_event fk_job_event_job_id_job; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job_event
    ADD CONSTRAINT fk_job_event_job_id_job FOREIGN KEY (job_id) REFERENCES public.job(id) ON DELETE CASCADE;


--
-- Name: job_lease fk_job_lease_job_id_job; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job_lease
    ADD CONSTRAINT fk_job_lease_job_id_job FOREIGN KEY (job_id) REFERENCES public.job(id) ON DELETE CASCADE;


--
-- Name: lease fk_lease_study_id_study; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.lease
    ADD CONSTRAINT fk_lease_study_id_study FOREIGN KEY (study_id) REFERENCES public.study(id) ON DELETE CASCADE;


--
-- Name: measurement fk_measurement_plan_id_plan; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.measurement
    ADD CONSTRAINT fk_measurement_plan_id_plan FOREIGN KEY (plan_id) REFERENCES public.plan(id) ON DELETE CASCADE;


--
-- Name: measurement fk_measurement_study_id_study; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.measurement
    ADD CONSTRAINT fk_measurement_study_id_study FOREIGN KEY (study_id) REFERENCES public.study(id) ON DELETE CASCADE;


--
-- Name: plan fk_plan_study_id_study; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.plan
    ADD CONSTRAINT fk_plan_study_id_study FOREIGN KEY (study_id) REFERENCES public.study(id) ON DELETE CASCADE;


--
-- Name: score_batch fk_score_batch_study_id_study; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.score_batch
    ADD CONSTRAINT fk_score_batch_study_id_study FOREIGN KEY (study_id) REFERENCES public.study(id) ON DELETE CASCADE;


--
-- Name: sensitivity fk_sensitivity_study_id_study; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.sensitivity
    ADD CONSTRAINT fk_sensitivity_study_id_study FOREIGN KEY (study_id) REFERENCES public.study(id) ON DELETE CASCADE;


--
-- Name: stage fk_stage_study_id_study; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.stage
    ADD CONSTRAINT fk_stage_study_id_study FOREIGN KEY (study_id) REFERENCES public.study(id) ON DELETE CASCADE;


--
-- Name: stored_array fk_stored_array_sha256_blob; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.stored_array
    ADD CONSTRAINT fk_stored_array_sha256_blob FOREIGN KEY (sha256) REFERENCES public.blob(sha256);


--
-- Name: stored_array fk_stored_array_study_id_study; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.stored_array
    ADD CONSTRAINT fk_stored_array_study_id_study FOREIGN KEY (study_id) REFERENCES public.study(id) ON DELETE CASCADE;


--
-- PostgreSQL database dump complete
--


