{{- define "creatify-exporter.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 52 | trimSuffix "-" }}
{{- end }}

{{/* The name of every object; 52 characters leave room for what a StatefulSet appends. */}}
{{- define "creatify-exporter.fullname" -}}
{{- $name := include "creatify-exporter.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "creatify-exporter.selectorLabels" -}}
{{- if .Values.selectorLabels }}
{{- toYaml .Values.selectorLabels }}
{{- else -}}
app.kubernetes.io/name: {{ include "creatify-exporter.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- end }}

{{- define "creatify-exporter.labels" -}}
{{- $standard := dict
  "app.kubernetes.io/name" (include "creatify-exporter.name" .)
  "app.kubernetes.io/instance" .Release.Name
  "app.kubernetes.io/version" .Chart.AppVersion
  "app.kubernetes.io/managed-by" .Release.Service
  "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_")
}}
{{- toYaml (merge (include "creatify-exporter.selectorLabels" . | fromYaml) .Values.commonLabels $standard) }}
{{- end }}

{{/* metadata of an object: list of context, suffix of the name, labels, annotations */}}
{{- define "creatify-exporter.metadata" -}}
{{- $context := index . 0 -}}
name: {{ include "creatify-exporter.fullname" $context }}{{ index . 1 }}
namespace: {{ $context.Release.Namespace }}
labels:
  {{- toYaml (merge (deepCopy (index . 2)) (include "creatify-exporter.labels" $context | fromYaml)) | nindent 2 }}
{{- with index . 3 }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "creatify-exporter.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "creatify-exporter.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{- define "creatify-exporter.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end }}
{{- end }}

{{- define "creatify-exporter.secretName" -}}
{{- .Values.existingSecret | default (include "creatify-exporter.fullname" .) }}
{{- end }}

{{/* Name of the Secret with web.yaml; empty without one. */}}
{{- define "creatify-exporter.webSecretName" -}}
{{- if .Values.web.existingSecret }}
{{- .Values.web.existingSecret }}
{{- else if .Values.web.config }}
{{- include "creatify-exporter.fullname" . }}-web
{{- end }}
{{- end }}

{{/* What a probe can ask: http, https, or the port alone, since the kubelet has neither a user nor a client certificate. */}}
{{- define "creatify-exporter.probe" -}}
{{- $context := index . 0 }}
{{- $web := $context.Values.web }}
{{- $tls := $web.config.tls_server_config | default dict }}
{{- if or $web.existingSecret $web.config.basic_auth_users (eq ($tls.client_auth_type | default "NoClientCert") "RequireAndVerifyClientCert") -}}
tcpSocket:
  port: metrics
{{- else -}}
httpGet:
  path: {{ index . 1 }}
  port: metrics
  {{- if $tls }}
  scheme: HTTPS
  {{- end }}
{{- end }}
timeoutSeconds: 5
{{- end }}

{{/* The configuration as the exporter gets it. */}}
{{- define "creatify-exporter.config" -}}
{{- $config := deepCopy .Values.config }}
{{- $ledger := $config.ledger | default dict }}
{{- if and .Values.postgresql.enabled (not $ledger.url) (not $ledger.url_file) }}
{{- $_ := set $config "ledger" (merge $ledger (dict "url_file" "/run/secrets/creatify-exporter/ledger_url")) }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{/* Values that cannot work, with what to do about each. */}}
{{- define "creatify-exporter.check" -}}
{{- if and (gt (int .Values.replicaCount) 1) (not .Values.postgresql.enabled) (not .Values.demo) }}
{{- fail "replicaCount above 1 needs postgresql.enabled: replicas share one ledger" }}
{{- end }}
{{- if and .Values.existingSecret .Values.secrets }}
{{- fail "existingSecret and secrets exclude each other" }}
{{- end }}
{{- if and .Values.web.existingSecret .Values.web.config }}
{{- fail "web.existingSecret and web.config exclude each other" }}
{{- end }}
{{- range $index, $workspace := .Values.config.workspaces }}
{{- range $key := list "api_id" "api_key" }}
{{- with get $workspace $key }}
{{- if not (contains "${" (toString .)) }}
{{- fail (printf "config.workspaces[%d].%s would lie in a ConfigMap: use %s_file and existingSecret" $index $key $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- $url := toString (dig "ledger" "url" "" (.Values.config | default dict)) }}
{{- if and (regexMatch "^postgresql://[^/]*:[^/]*@" $url) (not (contains "${" $url)) }}
{{- fail "config.ledger.url would put a password into a ConfigMap: use the key ledger_url of the Secret" }}
{{- end }}
{{- end }}
