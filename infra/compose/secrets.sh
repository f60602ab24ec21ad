#!/bin/bash
# Makes the passwords and keys of compose.yml, each a file of its own, in infra/compose/secrets or the folder that is named:
#
#     infra/compose/secrets.sh [FOLDER]
#
# What is there already is kept. The folder is open to its owner alone; the files in it are open to all, as the containers
# that they are given to run under users of their own.
set -euo pipefail

folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
chmod 700 "$folder"
cd "$folder"
umask 022

drawn() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

[ -e ray_token ] || drawn > ray_token
[ -e grafana_password ] || drawn > grafana_password
[ -e postgres_password ] || drawn > postgres_password
[ -e store_secret ] || drawn > store_secret
cat > postgres_service << END
[mlflow]
host=postgres
dbname=mlflow
user=mlflow
password=$(cat postgres_password)
END
cat > store_keys << END
[default]
aws_access_key_id = raydetr
aws_secret_access_key = $(cat store_secret)
END
cat > store_users << END
{"identities": [{
  "name": "raydetr",
  "credentials": [{"accessKey": "raydetr", "secretKey": "$(cat store_secret)"}],
  "actions": ["Admin", "Read", "Write", "List", "Tagging"]
}]}
END
