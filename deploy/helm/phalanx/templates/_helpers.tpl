{{- define "phalanx.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Short enough for what is added behind it. */}}
{{- define "phalanx.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "phalanx.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "phalanx.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "phalanx.selector" -}}
app.kubernetes.io/name: {{ include "phalanx.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "phalanx.labels" -}}
{{ include "phalanx.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "phalanx.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "phalanx.peers" -}}
{{ include "phalanx.fullname" . }}-coordinators
{{- end }}

{{- define "phalanx.tokenSecret" -}}
{{ .Values.joinToken.existingSecret | default (printf "%s-join-token" (include "phalanx.fullname" .)) }}
{{- end }}

{{/* Coordinators by name, so that certificates can name them. Those that autoscaling adds are learned from the leader. */}}
{{- define "phalanx.coordinators" -}}
{{- $scheme := ternary "https" "http" (ne .Values.tls.secret "") }}
{{- $urls := list }}
{{- range $i := until (int .Values.coordinator.replicas) }}
{{- $urls = append $urls (printf "%s://%s-coordinator-%d.%s.%s.svc:50051" $scheme (include "phalanx.fullname" $) $i (include "phalanx.peers" $) $.Release.Namespace) }}
{{- end }}
{{- join "," $urls }}
{{- end }}

{{/* ADDRESS:PORT. */}}
{{- define "phalanx.listen" -}}
{{- if contains ":" .address }}[{{ .address }}]{{ else }}{{ .address }}{{ end }}:{{ .port }}
{{- end }}

{{/* What both kinds of pods have in common. */}}
{{- define "phalanx.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "phalanx.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Arguments: context, and the role whose certificate is shown. By variables, because `cluster` in the probe reads them too. */}}
{{- define "phalanx.tlsEnv" -}}
{{- $role := index . 1 }}
{{- with (index . 0).Values.tls.secret }}
- name: PHALANX_CLUSTER_CA
  value: /etc/phalanx/tls/ca.pem
- name: PHALANX_CLUSTER_CERT
  value: /etc/phalanx/tls/{{ $role }}.pem
- name: PHALANX_CLUSTER_KEY
  value: /etc/phalanx/tls/{{ $role }}-key.pem
{{- end }}
{{- end }}

{{- define "phalanx.mounts" -}}
- name: cache
  mountPath: /var/cache/phalanx
- name: tmp
  mountPath: /tmp
- name: join-token
  mountPath: /etc/phalanx/join-token
  readOnly: true
{{- if .Values.tls.secret }}
- name: tls
  mountPath: /etc/phalanx/tls
  readOnly: true
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "phalanx.volumes" -}}
{{- $context := index . 0 }}
{{- $role := index . 1 }}
{{- with $context }}
- name: tmp
  emptyDir: {}
- name: join-token
  secret:
    secretName: {{ include "phalanx.tokenSecret" . }}
    defaultMode: 0440
    items:
      - key: join-token
        path: join-token
{{- if .Values.tls.secret }}
- name: tls
  secret:
    secretName: {{ .Values.tls.secret }}
    defaultMode: 0440
    items:
      - key: ca.pem
        path: ca.pem
      - key: {{ $role }}.pem
        path: {{ $role }}.pem
      - key: {{ $role }}-key.pem
        path: {{ $role }}-key.pem
{{- end }}
{{- if not .Values.cache.persistent }}
- name: cache
  emptyDir: {}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "phalanx.claims" -}}
{{- if .Values.cache.persistent }}
volumeClaimTemplates:
  - metadata:
      name: cache
    spec:
      accessModes: [ReadWriteOnce]
      {{- with .Values.cache.storageClass }}
      storageClassName: {{ . }}
      {{- end }}
      resources:
        requests:
          storage: {{ .Values.cache.size }}
{{- end }}
{{- end }}

{{/* Rather on different nodes: arguments are context and component. */}}
{{- define "phalanx.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "phalanx.selector" (index . 0) | nindent 8 }}
        app.kubernetes.io/component: {{ index . 1 }}
{{- end }}
