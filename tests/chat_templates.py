"""Chat templates in the styles of model families, shortened to the parts that tests need."""

# Llama 3.2: today's date in the system message, contents trimmed.
LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '[system]\\n\\nToday Date: ' + date_string + '\\n\\n' + system + '<|im_end|>' }}
{%- for m in messages %}
    {{- '[' + m['role'] + ']\\n\\n' + m['content']|trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]\\n\\n' }}{%- endif %}"""

# Qwen3: thoughts are kept in the turn being answered only, and an answer begins behind them.
QWEN_3 = """\
{%- set ns = namespace(last_query=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role != 'assistant' %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set content = m.content %}{%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- content }}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

# Gemma 2: turns alternate, no system message, the assistant is called model, contents trimmed.
GEMMA_2 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{%- endif %}
{%- for m in messages %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
    {{- '<|im_start|>' + role + '\\n' + m['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>model\\n' }}{%- endif %}"""

# Mistral 7B v0.3: a space joins an answer; the system message stands in the last message, if that
# is a user's.
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}
        {%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}
    {%- else %}{{- ' ' + m['content']|trim + eos_token }}{%- endif %}
{%- endfor %}"""

# Mistral Nemo: the same without the joining space.
MISTRAL_NEMO = MISTRAL.replace("' ' + m['content']|trim", "m['content']|trim")

CHATML = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# DeepSeek R1: an answer is asked for with the opening of its thoughts, earlier answers lose theirs.
DEEPSEEK_R1 = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m['role'] == 'assistant' %}
        {%- set content = m['content'] %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {{- '[assistant]' + content + eos_token }}
    {%- else %}{{- '[' + m['role'] + ']' + m['content'] }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]<think>\\n' }}{%- endif %}"""

# Takes no assistant's message at the end.
QUESTION_LAST = """\
{%- if messages[-1]['role'] != 'user' %}{{ raise_exception('ask something') }}{%- endif %}
{%- for m in messages %}{{- '<' + m['role'] + '>' + m['content'] + eos_token }}{%- endfor %}
{{- '<assistant>' }}"""

FAMILIES = {
    "llama 3": LLAMA_3,
    "qwen 3": QWEN_3,
    "gemma 2": GEMMA_2,
    "mistral": MISTRAL,
    "mistral nemo": MISTRAL_NEMO,
    "chatml": CHATML,
    "deepseek r1": DEEPSEEK_R1,
    "question last": QUESTION_LAST,
}
NO_SYSTEM = ("gemma 2",)
