# The whole project on a CPU:   docker build -t spa_jax . && docker run -it spa_jax
# Then, in it:                  make quickstart
FROM python:3.12-slim-bookworm

RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ gcc git make \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /spa_jax
# What the installation needs, first: a change of the code does not install anew.
COPY Makefile README.md LICENSE pyproject.toml requirements.txt ./
COPY locks locks
COPY spa_jax/__init__.py spa_jax/__init__.py
RUN make setup LOCKED=1
COPY . .

CMD ["bash"]
